"""The history of adapter residency, as sessions, watchers and the store client read it.

It belongs to the asyncio thread: the step loop hands events over with ``call_soon_threadsafe``.
"""

from __future__ import annotations

from collections import deque

from loraplex_common.errors import SequenceGapError
from loraplex_common.wake_up import WakeUp

from loraplex_engine.messages import ResidencyChanged, ResidencyState


class ResidencyFeed:
    """A ring of the last residency events, and the latest event of each adapter that is held or wanted.

    Args:
        capacity: Events kept; a reader that is further behind must list all adapters again.

    Attributes:
        sequence: Number of the latest event.
        resident: Digests on the device, ready to be leased.
        resident_version: Rises with each change of `resident`; most events, such as leases, do not change it.
    """

    def __init__(self, capacity: int) -> None:
        self._ring: deque[ResidencyChanged] = deque(maxlen=capacity)
        self._latest: dict[str, ResidencyChanged] = {}
        self._changed = WakeUp()
        self.sequence = 0
        self.resident: set[str] = set()
        self.resident_version = 0

    def append(self, event: ResidencyChanged) -> None:
        """Add the next event and wake the readers.

        Raises:
            ValueError: If an event was lost: sequences must rise by one.
        """
        if self.sequence and event.sequence != self.sequence + 1:
            raise ValueError(f"residency event {event.sequence} follows {self.sequence}: one was lost")
        self.sequence = event.sequence
        self._ring.append(event)
        if event.state is ResidencyState.ABSENT:
            self._latest.pop(event.digest, None)
        else:
            self._latest[event.digest] = event
        if (event.state is ResidencyState.RESIDENT) != (event.digest in self.resident):
            self.resident ^= {event.digest}
            self.resident_version += 1
        self._changed.notify()

    @property
    def held(self) -> list[ResidencyChanged]:
        """The latest event of each adapter that is in the arena or on the device."""
        return [event for event in self._latest.values() if event.state is not ResidencyState.WANTED]

    def in_state(self, *states: ResidencyState) -> list[str]:
        """Return the digests in any of the states."""
        return [digest for digest, event in self._latest.items() if event.state in states]

    def since(self, sequence: int) -> list[ResidencyChanged]:
        """Return the events after a sequence.

        Raises:
            SequenceGapError: If the ring does not reach back that far, or the sequence belongs to another run of
                the engine.
        """
        oldest = self._ring[0].sequence if self._ring else self.sequence + 1
        if not oldest - 1 <= sequence <= self.sequence:
            raise SequenceGapError(
                f"events after {sequence} are not at hand, only those after {oldest - 1} up to {self.sequence}: list again"
            )
        missed = self.sequence - sequence
        return [self._ring[index] for index in range(len(self._ring) - missed, len(self._ring))]

    async def wait_beyond(self, sequence: int) -> None:
        """Return once an event after the sequence exists."""
        await self._changed.wait_until(lambda: self.sequence > sequence)
