"""Ends a stream whose client has stopped reading; never because this process was too busy to notice that it read."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar, Final
from weakref import WeakKeyDictionary

from loraplex_common.errors import SlowConsumerError

TICK_S: Final = 0.25
# What a busy loop is late anyway; only a tick later than this says that the loop stood still.
MAX_LATE_S: Final = 0.25


class LoopTime:
    """Seconds that an event loop has run: while it stands still, so does this clock.

    Clients read and kernels take data in while a loop is frozen, but nothing here hears of it before the loop goes on.
    A clock that goes on meanwhile would blame the client. Ticks only while a guard watches.
    """

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, LoopTime]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._seen_at = time.monotonic()
        self._lost_s = 0.0
        self._num_watching = 0
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def running(cls) -> LoopTime:
        """Return the running loop's clock."""
        return cls._of.setdefault(asyncio.get_running_loop(), cls())

    def now(self) -> float:
        """Return seconds since some instant; to compare while watching only."""
        return time.monotonic() - self._lost_s - self._late_s()

    def watch(self) -> None:
        """Have the clock go until as many times `unwatch`."""
        self._num_watching += 1
        if self._timer is None:
            self._seen_at = time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def unwatch(self) -> None:
        """Take one `watch` back."""
        self._num_watching -= 1

    def _late_s(self) -> float:
        if self._timer is None:
            return 0.0
        return max(0.0, time.monotonic() - self._seen_at - TICK_S - MAX_LATE_S)

    def _tick(self) -> None:
        self._lost_s += self._late_s()
        self._seen_at = time.monotonic()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TICK_S, self._tick) if self._num_watching else None


class StallGuard:
    """Cancels the task that created it once one write has waited too long.

    gRPC blocks the handler's write, inside code that is not ours, while the client's window is full; only cancelling
    the handler gets it out of there. `close` stops the clock.

    Args:
        limit_s: Longest time one write may wait, by `LoopTime`.

    Attributes:
        has_fired: True once the task has been cancelled for this reason.
    """

    def __init__(self, limit_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.has_fired = False
        self._task = task
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._time = LoopTime.running()
        self._time.watch()
        self._write_began: float | None = None
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(limit_s, self._check)

    def writing(self) -> None:
        """Note that a write begins."""
        self._write_began = self._time.now()

    def written(self) -> None:
        """Note that it is over."""
        self._write_began = None

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._time.unwatch()

    def error(self) -> SlowConsumerError:
        """Return what the stream ends with."""
        return SlowConsumerError(f"the client has not read its stream for {self._limit_s:g} s", drop_reason="evicted")

    def _check(self) -> None:
        # One timer per stream, not one per write: it looks again when the write under way would be too old.
        waited_s = 0.0 if self._write_began is None else self._time.now() - self._write_began
        if waited_s >= self._limit_s:
            self.has_fired = True
            self._task.cancel()
            return
        self._timer = self._loop.call_later(max(TICK_S / 10, self._limit_s - waited_s), self._check)
