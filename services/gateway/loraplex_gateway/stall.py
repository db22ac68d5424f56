"""Ends a stream whose client has stopped reading."""

from __future__ import annotations

import asyncio

from loraplex_common.errors import SlowConsumerError


class StallGuard:
    """Cancels the task that created it once one write has waited too long.

    gRPC blocks the handler's write, inside code that is not ours, while the client's window is full; only cancelling
    the handler gets it out of there. `close` stops the clock.

    Args:
        limit_s: Longest time one write may wait.

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
        self._write_began: float | None = None
        self._timer = self._loop.call_later(limit_s, self._check)

    def writing(self) -> None:
        """Note that a write begins."""
        self._write_began = self._loop.time()

    def written(self) -> None:
        """Note that it is over."""
        self._write_began = None

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def error(self) -> SlowConsumerError:
        """Return what the stream ends with."""
        return SlowConsumerError(f"the client has not read its stream for {self._limit_s:g} s", drop_reason="evicted")

    def _check(self) -> None:
        # One timer per stream, not one per write: it looks again when the write under way would be too old.
        waited_s = 0.0 if self._write_began is None else self._loop.time() - self._write_began
        if waited_s >= self._limit_s:
            self.has_fired = True
            self._task.cancel()
            return
        self._timer = self._loop.call_later(self._limit_s - waited_s, self._check)
