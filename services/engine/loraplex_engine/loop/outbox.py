"""The outputs from the step loop to one gateway's session; while a write is pending, steps merge into one message.

The loop never waits for a reader. A reader that lets `MAX_BACKLOG_BYTES` or `MAX_BACKLOG_S` pile up loses its session.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.errors import LoraplexError, SlowConsumerError

from loraplex_engine.limits import MAX_BACKLOG_BYTES, MAX_BACKLOG_S
from loraplex_engine.messages import PromptLogprobs, SessionEvent, StepOutputs, TokenWithLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN_BYTES: Final = 12  # three int32
_EVENT_BYTES: Final = 64  # about what a small event takes on the wire
_LOGPROB_BYTES: Final = 8


def _event_bytes(event: SessionEvent) -> int:
    if isinstance(event, TokenWithLogprobs):
        return _EVENT_BYTES + _LOGPROB_BYTES * len(event.logprobs.token_ids)
    if isinstance(event, PromptLogprobs):
        return _EVENT_BYTES + sum(_LOGPROB_BYTES * len(entry.token_ids) + 8 for entry in event.entries)
    return _EVENT_BYTES


def merge(parts: list[StepOutputs]) -> StepOutputs:
    """Join outputs of successive steps into one; the order within each slot stays."""
    if len(parts) == 1:
        return parts[0]
    return StepOutputs(
        step_id=parts[-1].step_id,
        token_slots=np.concatenate([part.token_slots for part in parts]),
        token_positions=np.concatenate([part.token_positions for part in parts]),
        token_ids=np.concatenate([part.token_ids for part in parts]),
        events=[event for part in parts for event in part.events],
    )


class SessionOutbox:
    """One session's pending outputs; the loop puts them in, one reader takes them out.

    Args:
        session_id: The session.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        session_id: int,
        *,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
        max_backlog_s: float = MAX_BACKLOG_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session_id = session_id
        self._max_backlog_bytes = max_backlog_bytes
        self._max_backlog_s = max_backlog_s
        self._clock = clock
        self._changed = threading.Condition()
        self._pending: list[StepOutputs] = []
        self._pending_bytes = 0
        self._pending_since_s = 0.0
        self._is_closed = False
        self._error: LoraplexError | None = None
        self._reader: asyncio.Future[None] | None = None  # set while `next` sleeps; cleared by the put that wakes it

    def put(self, outputs: StepOutputs) -> bool:
        """Add a step's outputs; called by the loop's thread.

        Returns:
            False if the session is gone, or has just been closed for its backlog: the caller ends its requests.
        """
        with self._changed:
            if self._is_closed:
                return False
            now = self._clock()
            if not self._pending:
                self._pending_since_s = now
            self._pending.append(outputs)
            self._pending_bytes += _TOKEN_BYTES * len(outputs.token_ids) + sum(map(_event_bytes, outputs.events))
            if self._pending_bytes > self._max_backlog_bytes:
                self._close(SlowConsumerError(f"session has {self._pending_bytes} bytes of unread output"))
            elif now - self._pending_since_s > self._max_backlog_s:
                self._close(SlowConsumerError(f"session has not read for {now - self._pending_since_s:.1f} s"))
            self._wake()
            return not self._is_closed

    def close(self, error: LoraplexError | None = None) -> None:
        """End the session from either side; the reader gets the pending outputs, then ``error`` or the end."""
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._error = error
                self._wake()

    def _close(self, error: LoraplexError) -> None:
        self._is_closed = True
        self._error = error
        self._pending.clear()

    def _wake(self) -> None:
        self._changed.notify_all()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.get_loop().call_soon_threadsafe(_resolve, reader)

    def take(self) -> StepOutputs | None:
        """Return all pending outputs, merged, or None if there are none.

        Raises:
            SlowConsumerError: If the session was closed for its backlog.
            LoraplexError: The error that the session was closed with.
        """
        with self._changed:
            if self._pending:
                parts, self._pending = self._pending, []
                self._pending_bytes = 0
                return merge(parts)
            if self._error is not None:
                raise self._error
            return None

    async def next(self) -> StepOutputs | None:
        """Wait for outputs and take them; None once the session is closed and read to its end. One reader only.

        Raises:
            LoraplexError: The same errors as `take`.
        """
        while True:
            with self._changed:
                if not self._pending and not self._is_closed:
                    self._reader = asyncio.get_running_loop().create_future()
                reader = self._reader
            if reader is None:
                return self.take()
            await reader

    def wait(self, timeout_s: float) -> StepOutputs | None:
        """Wait in a plain thread and take; None after ``timeout_s``, or once closed and read to its end.

        Raises:
            LoraplexError: The same errors as `take`.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._pending) or self._is_closed, timeout_s)
        return self.take()


def _resolve(reader: asyncio.Future[None]) -> None:
    if not reader.done():
        reader.set_result(None)
