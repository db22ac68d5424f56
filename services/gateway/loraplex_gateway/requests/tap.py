"""The short way of a token: from an engine's message to the client in one turn of the event loop, waking no task.

A stream's long way is a chain of generators from its ticket to the response; each of its tokens wakes the task at the end
of it. While that task waits for news and its client takes data, plain tokens need none of this: the ticket hands them to
the request's tap, and the tap's sink writes what they become. Whatever else comes - a start, an end, a failure, tokens for
which the sink has no room - goes the long way, behind what the tap has taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.requests.access_log import RequestRecord
    from loraplex_gateway.requests.run import RequestRun
    from loraplex_gateway.types import Chunk

# Tokens of one chunk, as of one update.
MAX_PENDING: Final = 1024


class Sink(Protocol):
    """What writes a stream's chunks to its client, outside of the task that writes all else."""

    def is_ready(self) -> bool:
        """Whether a chunk may be handed over now: nothing that comes before it is still to be written by that task."""
        ...

    def notify(self, tap: Tap) -> None:
        """Note that `tap.pull` has a chunk, or will have one when more tokens have come."""
        ...


class Tap:
    """Takes plain tokens of one request off its ticket.

    Args:
        run: The request; it must have no stop strings, as their match is an end.
        record: Its line in the log.
        sink: Where chunks go.

    Attributes:
        is_open: Whether the start has gone by, so that tokens may.
        output: All tokens of the request so far; those that are taken are added.
    """

    def __init__(self, run: RequestRun, record: RequestRecord, sink: Sink) -> None:
        self._run = run
        self._record = record
        self._sink = sink
        self._pending: list[int] = []
        self.is_open = False
        self.output: list[int] = []

    def take(self, token_id: int) -> bool:
        """Take the next token, if it can be written; return whether it was taken."""
        if not self.is_open or len(self._pending) >= MAX_PENDING or not self._sink.is_ready():
            return False
        self.output.append(token_id)
        self._pending.append(token_id)
        self._sink.notify(self)
        return True

    def pull(self) -> Chunk | None:
        """Return what the tokens that have been taken since the last call become; None for nothing to send."""
        chunk = self._push()
        if chunk is not None:
            self._record.see(chunk, num_tokens=self._run.num_tokens)
        return chunk

    def rest(self) -> Sequence[Chunk]:
        """Return what has been taken and not been pulled: it comes before the news that go the long way."""
        chunk = self._push()
        return () if chunk is None else (chunk,)

    def _push(self) -> Chunk | None:
        token_ids, self._pending = self._pending, []
        return self._run.push(token_ids) if token_ids else None
