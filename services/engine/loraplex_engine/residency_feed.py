"""The history of adapter residency, as sessions, watchers and the store client read it.

Lives on the asyncio side: the step loop hands events over with ``call_soon_threadsafe``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from loraplex_common.errors import SequenceGapError

from loraplex_engine.messages import ResidencyChanged, ResidencyState


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceDelta:
    """How the set of adapters on the device changed.

    Attributes:
        is_snapshot: `added` is the whole set and everything known before is void.
        sequence: The last event that is included.
    """

    is_snapshot: bool
    added: tuple[str, ...]
    removed: tuple[str, ...]
    sequence: int


class ResidencyFeed:
    """Ring of the last residency events, and the latest one of each adapter that is held or wanted.

    Args:
        capacity: Events kept; a reader that is further behind must list again.
    """

    def __init__(self, capacity: int) -> None:
        self._ring: deque[ResidencyChanged] = deque(maxlen=capacity)
        self._latest: dict[str, ResidencyChanged] = {}
        self._changed = asyncio.Event()
        self.sequence = 0

    def append(self, event: ResidencyChanged) -> None:
        """Take the next event and wake the readers.

        Raises:
            ValueError: If an event was lost: sequences rise by one.
        """
        if self.sequence and event.sequence != self.sequence + 1:
            raise ValueError(f"residency event {event.sequence} follows {self.sequence}: one was lost")
        self.sequence = event.sequence
        self._ring.append(event)
        if event.state is ResidencyState.ABSENT:
            self._latest.pop(event.digest, None)
        else:
            self._latest[event.digest] = event
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def held(self) -> list[ResidencyChanged]:
        """The latest event of each adapter that is in the arena or on the device."""
        return [event for event in self._latest.values() if event.state is not ResidencyState.WANTED]

    def in_state(self, *states: ResidencyState) -> list[str]:
        """Return the digests in any of the states."""
        return [digest for digest, event in self._latest.items() if event.state in states]

    def latest(self, digest: str) -> ResidencyState:
        """Return an adapter's state."""
        event = self._latest.get(digest)
        return ResidencyState.ABSENT if event is None else event.state

    def since(self, sequence: int) -> list[ResidencyChanged]:
        """Return the events after a sequence.

        Raises:
            SequenceGapError: If the ring does not reach back that far, or the sequence is of another engine's life.
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
        while self.sequence <= sequence:
            await self._changed.wait()

    def delta_since(self, sequence: int | None) -> DeviceDelta:
        """Return how the set of adapters on the device changed after a sequence; None or a gap gives a snapshot."""
        if sequence is not None:
            try:
                latest = {event.digest: event.state is ResidencyState.RESIDENT for event in self.since(sequence)}
            except SequenceGapError:
                return self.delta_since(None)
            added = tuple(digest for digest, is_resident in latest.items() if is_resident)
            removed = tuple(digest for digest, is_resident in latest.items() if not is_resident)
            return DeviceDelta(is_snapshot=False, added=added, removed=removed, sequence=self.sequence)
        resident = tuple(self.in_state(ResidencyState.RESIDENT))
        return DeviceDelta(is_snapshot=True, added=resident, removed=(), sequence=self.sequence)
