"""One image on its way into one engine."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from loraplex_adapter_store.attach.messages import Grant, Offer, Residency


class TransferState(Enum):
    """How far a transfer is."""

    PREPARING = "preparing"
    OFFERED = "offered"
    FILLING = "filling"
    SENT = "sent"
    ENDED = "ended"


_ALLOWED: Final = {
    TransferState.PREPARING: {TransferState.OFFERED, TransferState.ENDED},
    TransferState.OFFERED: {TransferState.FILLING, TransferState.ENDED},
    TransferState.FILLING: {TransferState.SENT, TransferState.ENDED},
    TransferState.SENT: {TransferState.PREPARING, TransferState.ENDED},  # back if the engine found it corrupt
    TransferState.ENDED: set(),
}


class Transfer:
    """State of one transfer; the session drives it.

    Attributes:
        is_wanted: Whether a request waits for it; may become true on the way.
        offers: One per rank, once the image is known; its pages themselves are not held while the engine thinks.
    """

    def __init__(self, digest: str, *, is_wanted: bool, num_ranks: int) -> None:
        self.digest = digest
        self.is_wanted = is_wanted
        self.offers: list[Offer] = []
        self.state = TransferState.PREPARING
        self._num_ranks = num_ranks
        self._slots: dict[int, tuple[int, ...]] = {}
        self._granted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._arrived: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def advance(self, state: TransferState) -> None:
        """Move to a state.

        Raises:
            RuntimeError: If that is no way from the present one.
        """
        if state not in _ALLOWED[self.state]:
            raise RuntimeError(f"transfer of {self.digest}: {self.state.name} cannot become {state.name}")
        self.state = state
        if state is TransferState.PREPARING:
            self._slots.clear()
            self._granted = asyncio.get_running_loop().create_future()
            self._arrived = asyncio.get_running_loop().create_future()

    def grant(self, grant: Grant, num_slots: int) -> None:
        """Take an engine's slots for one rank.

        Raises:
            InvalidParameterError: If there was no offer, or the slots are not as many as pages, distinct and existing.
        """
        where = f"grant for {grant.digest} rank {grant.rank}"
        if self.state is not TransferState.OFFERED or not 0 <= grant.rank < self._num_ranks:
            raise InvalidParameterError(f"{where}: nothing is offered", field="grant")
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
        if len(self._slots) == self._num_ranks and not self._granted.done():
            self._granted.set_result(True)

    def decline(self) -> None:
        """Take the engine's no."""
        if not self._granted.done():
            self._granted.set_result(False)

    def arrived(self, event: Residency) -> None:
        """Take the engine's word on what it received."""
        if self.state is TransferState.SENT and not self._arrived.done():
            self._arrived.set_result(event.failure)

    async def wait_for_slots(self) -> dict[int, tuple[int, ...]] | None:
        """Return the slots by rank once all ranks have granted; None if the engine declined."""
        return self._slots if await self._granted else None

    async def wait_for_arrival(self) -> str | None:
        """Return what was wrong with what arrived; None if all is well."""
        return await self._arrived
