"""The slots of one session: which request each stands for, and which adapters those requests use."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_gateway.engines.ticket import Ticket
    from loraplex_gateway.usage.account import Attempt


class Slots:
    """Numbers that stand for requests on a session. A slot is free, used by a ticket, or aborting.

    A request that is aborted keeps its slot until its engine has said its end: until then, what arrives for the slot is
    that request's.

    Attributes:
        tickets: The ticket of each used slot; only to be read.
    """

    def __init__(self) -> None:
        self.tickets: dict[int, Ticket] = {}
        self._digests: dict[int, tuple[str, ...]] = {}  # slot -> adapters in use there
        self._digest_uses: Counter[str] = Counter()
        self._aborting: set[int] = set()
        self._attempts: dict[int, Attempt] = {}  # until the engine has said the end
        self._free: list[int] = []
        self._num_slots = 0

    @property
    def digests(self) -> frozenset[str]:
        """Adapters of the requests in used slots."""
        return frozenset(self._digest_uses)

    def uses(self, digest: str) -> bool:
        """Whether a request in a used slot needs an adapter."""
        return self._digest_uses[digest] > 0

    def take(
        self, digests: tuple[str, ...], make_ticket: Callable[[int], Ticket], attempt: Attempt | None = None
    ) -> Ticket:
        """Return the ticket of a new request for some adapters, made for a slot that is free."""
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
        ticket = self.tickets[slot] = make_ticket(slot)
        self._digests[slot] = digests
        self._digest_uses.update(digests)
        if attempt is not None:
            self._attempts[slot] = attempt
        return ticket

    def release(self, slot: int, *, is_known: bool) -> None:
        """End the use of a slot; it is free at once only if its engine does not know of the request."""
        self._forget(slot)
        if is_known:
            self._aborting.add(slot)
        else:
            self._free.append(slot)
            self._close_attempt(slot, (0.0, 0.0))

    def ended(self, slot: int, used: tuple[float, float] | None = None) -> bool:
        """Free a slot whose request has ended on its engine; return whether it was aborting.

        Args:
            slot: The slot.
            used: Page-seconds of the request's sequence and of its adapters; None if the engine does not say.
        """
        self._close_attempt(slot, used)
        if slot in self.tickets:
            self._forget(slot)
            self._free.append(slot)
            return False
        if slot in self._aborting:
            self._aborting.remove(slot)
            self._free.append(slot)
            return True
        return False

    def lose(self) -> None:
        """Note that nothing more will be heard of any slot."""
        for slot in tuple(self._attempts):
            self._close_attempt(slot, None)

    def check_integrity(self) -> None:
        """Raise if slots are lost or used twice.

        Raises:
            RuntimeError: If free + used + aborting is not the number of slots ever made.
        """
        used, free = set(self.tickets), set(self._free)
        counted = len(used) + len(free) + len(self._aborting)
        if counted != self._num_slots or len(used | free | self._aborting) != counted:
            raise RuntimeError(
                f"slots: {len(used)} used + {len(free)} free + {len(self._aborting)} aborting != {self._num_slots}"
            )

    def _close_attempt(self, slot: int, used: tuple[float, float] | None) -> None:
        attempt = self._attempts.pop(slot, None)
        if attempt is None:
            return
        if used is None:
            attempt.lost()
        else:
            attempt.reported(*used)

    def _forget(self, slot: int) -> None:
        del self.tickets[slot]
        for digest in self._digests.pop(slot):
            self._digest_uses[digest] -= 1
            if not self._digest_uses[digest]:
                del self._digest_uses[digest]
