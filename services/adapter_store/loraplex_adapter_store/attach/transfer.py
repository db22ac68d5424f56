"""One image on its way into one engine."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from enum import Enum
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_adapter_store.attach.messages import Grant, Offer, Place

if TYPE_CHECKING:
    from loraplex_common.tracing import Span


class TransferState(Enum):
    """State of a transfer."""

    PREPARING = "preparing"
    OFFERED = "offered"
    FILLING = "filling"
    SENT = "sent"
    ENDED = "ended"


ARRIVAL_S: Final = 5.0
"""Longest time for an engine to check an image. The engine may also have dropped it silently, as unwanted by then."""

_ALLOWED: Final = {  # back to PREPARING if the engine found the image corrupt
    TransferState.PREPARING: {TransferState.OFFERED, TransferState.ENDED},
    TransferState.OFFERED: {TransferState.FILLING, TransferState.PREPARING, TransferState.ENDED},
    TransferState.FILLING: {TransferState.SENT, TransferState.ENDED},
    TransferState.SENT: {TransferState.PREPARING, TransferState.ENDED},
    TransferState.ENDED: set(),
}


class Transfer:
    """State of one transfer; the session drives it.

    Attributes:
        is_wanted: Whether a request waits for the image; may become true during the transfer.
        offers: One per rank, once the image is known; the pages themselves are not held while the engine decides.
        offering: Held while the offers of all ranks are sent.
        is_expected: Whether a label is about to move to the image.
        span: Traces the transfer for the first request of a trace that waits for the image; None without one.
        is_wanted_again: Whether a want came after everything had been sent.
        failure: What the engine found wrong with this attempt.
        needed_by_s: Time of the event loop's clock by which the first waiting request needs it; infinity without a
            limit.
        foreseen_s: When it will be wanted, as hints say, on the same clock; infinity without a hint. Unused once it is
            wanted.
    """

    def __init__(self, digest: str, *, is_wanted: bool, num_ranks: int) -> None:
        self.digest = digest
        self.is_wanted = is_wanted
        self.is_wanted_again = False
        self.span: Span | None = None
        self.is_expected = False
        self.offers: list[Offer] = []
        self.offering = asyncio.Lock()
        self.failure: str | None = None
        self.needed_by_s = math.inf
        self.foreseen_s = math.inf
        self.state = TransferState.PREPARING
        self._num_ranks = num_ranks
        self._has_unsolicited_offer = False
        self._is_dropped = False
        self._slots: dict[int, tuple[int, ...]] = {}
        self._answered = asyncio.Event()
        self._arrived = asyncio.Event()

    @property
    def urgency(self) -> tuple[bool, float]:
        """Sort key by which transfers get their turn, smallest first."""
        return (not self.is_wanted, self.needed_by_s if self.is_wanted else self.foreseen_s)

    def foreseen_within(self, wanted_in_s: float) -> None:
        """Note a hint that the image will be wanted in that many seconds."""
        self.foreseen_s = min(self.foreseen_s, asyncio.get_running_loop().time() + wanted_in_s)

    def needed_within(self, time_left_s: float | None) -> None:
        """Note that one more request waits for the image; None if it can wait without limit."""
        if time_left_s is not None:
            self.needed_by_s = min(self.needed_by_s, asyncio.get_running_loop().time() + time_left_s)

    def want(self) -> None:
        """Note that a request waits for the image; after everything had been sent, the engine needs it once more."""
        self.is_wanted = True
        self.is_wanted_again = self.state is TransferState.SENT
        self._end_if_dropped()

    def advance(self, state: TransferState) -> None:
        """Move to a state.

        Raises:
            RuntimeError: If the present state does not allow it.
        """
        if state not in _ALLOWED[self.state]:
            raise RuntimeError(f"transfer of {self.digest}: {self.state.name} cannot become {state.name}")
        self.state = state
        if state is TransferState.PREPARING:
            self.failure = None
            self._slots = {}
            self._is_dropped = False
            self._answered.clear()
            self._arrived.clear()

    def current_offers(self) -> list[Offer]:
        """Return the offers of this attempt."""
        self._has_unsolicited_offer |= not self.is_wanted
        return [
            dataclasses.replace(offer, is_wanted=self.is_wanted, is_expected=self.is_expected) for offer in self.offers
        ]

    def grant(self, grant: Grant, num_slots: int) -> None:
        """Take an engine's slots for one rank.

        Raises:
            InvalidParameterError: If there is not one slot per page, or slots are not distinct or do not exist.
        """
        where = f"grant for {grant.digest} rank {grant.rank}"
        if not 0 <= grant.rank < self._num_ranks:
            raise InvalidParameterError(f"{where}: there is no such rank", field="grant.rank")
        num_pages = self.offers[grant.rank].num_pages
        if len(grant.slots) != num_pages or len(set(grant.slots)) != num_pages:
            raise InvalidParameterError(
                f"{where}: {len(set(grant.slots))} different slots for {num_pages} pages", field="grant.slots"
            )
        if any(slot >= num_slots for slot in grant.slots):
            raise InvalidParameterError(
                f"{where}: slot {max(grant.slots)} of {num_slots} does not exist", field="grant.slots"
            )
        self._slots[grant.rank] = grant.slots
        if len(self._slots) == self._num_ranks:
            self._answered.set()

    def decline(self) -> bool:
        """Take the engine's refusal; return whether it ends the transfer.

        The refusal of an unsolicited offer may cross a want: the offer is then being repeated as a wanted one, and the
        answer to that one counts.
        """
        is_crossing = self.is_wanted and self._has_unsolicited_offer
        self._has_unsolicited_offer = False
        if not is_crossing:
            self._answered.set()
        return not is_crossing

    def report(self, place: Place, failure: str | None) -> None:
        """Take the engine's report on the image: that it has the image, or what was wrong with it."""
        is_under_way = self.state in (TransferState.OFFERED, TransferState.FILLING, TransferState.SENT)
        if failure is not None and is_under_way:
            self.failure = failure
        if failure is not None or place is not Place.GONE:
            self._arrived.set()
            if self.state is TransferState.OFFERED:  # the engine has the image already, or cannot read the offer
                self._answered.set()
        elif self.state is TransferState.SENT:
            self._is_dropped = True
            self._end_if_dropped()

    def _end_if_dropped(self) -> None:
        """End the wait for an image that came and went between two reports, and that a request waits for again."""
        if self._is_dropped and self.is_wanted_again:
            self._arrived.set()

    async def wait_for_slots(self) -> dict[int, tuple[int, ...]] | None:
        """Return the slots by rank once all ranks have granted; None if one refuses."""
        await self._answered.wait()
        return self._slots if len(self._slots) == self._num_ranks else None

    async def wait_for_arrival(self) -> bool:
        """Return True once the engine has reported how the transfer went; False if no report comes in time."""
        try:
            async with asyncio.timeout(ARRIVAL_S):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True
