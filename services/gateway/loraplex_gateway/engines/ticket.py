"""One request's place in an engine session: what the engine has said and its reader has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError, SlowConsumerError

from loraplex_gateway.engines.wire import EngineFinish, EngineStart, LogprobsMessage
from loraplex_gateway.types import AdapterLoading

if TYPE_CHECKING:
    from collections.abc import Callable

# Bounds of one update, and so of one chunk: however far a client lags behind, no message comes near 4 MiB.
MAX_UPDATE_TOKENS: Final = 1024
MAX_UPDATE_LOGPROBS: Final = 128


class EngineLostError(Exception):
    """The session broke, or the engine broke its protocol, before the request ended.

    Args:
        message: What happened.
        had_request: The engine had been sent the request, and the session was not ended from this side: for all that is
            known here, the request may be the cause.
    """

    def __init__(self, message: str, *, had_request: bool) -> None:
        super().__init__(message)
        self.had_request = had_request


class LocalCancelError(Exception):
    """CancelRequest ended the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineUpdate:
    """All news since the last update; `logprobs` is parallel to `token_ids` where asked for. `end` is a normal one."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[LogprobsMessage] = ()
    started: EngineStart | None = None
    loading: AdapterLoading | None = None
    end: EngineFinish | None = None


class Ticket:
    """A bounded buffer between the session's reader, which never waits, and one client's stream.

    Args:
        slot: The request's number in the session.
        next_sequence: Position of the first token that is still to come.
        max_buffered_tokens: More unread tokens than this end the request.
        on_overflow: Called once when that happens; aborts the request on the engine.

    Attributes:
        slot: The request's number in the session.
        is_ended: Whether the engine has said the request's end.
        take: Offered each plain token that comes while the reader waits and has read all; returns whether it took it. None
            has the reader read them all.
    """

    def __init__(
        self, slot: int, *, next_sequence: int, max_buffered_tokens: int, on_overflow: Callable[[Ticket], None]
    ) -> None:
        self.slot = slot
        self.is_ended = False
        self.take: Callable[[int], bool] | None = None
        self._expected = next_sequence
        self._max_buffered_tokens = max_buffered_tokens
        self._on_overflow = on_overflow
        self._tokens: list[int] = []
        self._logprobs: list[LogprobsMessage] = []
        self._started: EngineStart | None = None
        self._loading: AdapterLoading | None = None
        self._end: EngineFinish | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_called = (
            False  # the reader waited, has been woken, and had no turn yet: it is this process that is late
        )

    def push_token(self, sequence: int, token_id: int) -> None:
        """Add one plain token; a request that has failed takes no more."""
        if self._failure is not None:
            return
        if sequence != self._expected:
            if sequence > self._expected:
                self._gap(sequence)
            return  # a repeated token is none
        self._expected += 1
        if self.take is not None and self._waiter is not None and self._is_taken(self.take, token_id):
            return
        self._tokens.append(token_id)
        if len(self._tokens) > self._max_buffered_tokens and not self._is_reading:
            self._overflow()
        elif self._waiter is not None:
            self._wake()

    def push_output(
        self,
        *,
        sequence: int,
        token_ids: Sequence[int],
        logprobs: Sequence[LogprobsMessage],
        started: EngineStart | None,
        loading: AdapterLoading | None,
        end: EngineFinish | LoraplexError | None,
    ) -> None:
        """Add news that is more than a plain token; a request that has failed takes no more."""
        if self._failure is not None:
            return
        if token_ids and sequence > self._expected:
            self._gap(sequence)
            return
        repeated = self._expected - sequence if token_ids else 0
        self._tokens += token_ids[repeated:]
        self._logprobs += logprobs[repeated:]
        self._expected += max(0, len(token_ids) - repeated)
        self._started = started or self._started
        self._loading = loading or self._loading
        if isinstance(end, LoraplexError):
            self.fail(end)
        elif end is not None:
            self._end = end
        self.is_ended = self.is_ended or end is not None
        if len(self._tokens) > self._max_buffered_tokens and not self._is_reading:
            self._overflow()
        else:
            self._wake()

    def fail(self, error: Exception) -> None:
        """End the request with an error; what has been received before is still read first."""
        if self._failure is None and not self.is_ended:
            self._failure = error
            self._wake()

    def cancel(self) -> None:
        """End the request because its owner asked for it."""
        self.fail(LocalCancelError())

    async def next(self) -> EngineUpdate:
        """Wait for news and return it; more tokens than fit a message are left for the next call, and so is the end.

        Raises:
            EngineLostError: If the session broke.
            LocalCancelError: If the request was cancelled by its id.
            SlowConsumerError: If the buffer overflowed.
            LoraplexError: What the engine ended the request with.
        """
        while not self._has_news():
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter, self._is_called = None, False
        most = MAX_UPDATE_LOGPROBS if self._logprobs else MAX_UPDATE_TOKENS
        tokens, self._tokens = self._tokens[:most], self._tokens[most:]
        logprobs, self._logprobs = self._logprobs[:most], self._logprobs[most:]
        update = EngineUpdate(
            token_ids=tokens,
            logprobs=logprobs,
            started=self._started,
            loading=self._loading,
            end=None if self._tokens else self._end,
        )
        self._started = self._loading = None
        if not self._tokens:
            self._end = None
        return update

    def _is_taken(self, take: Callable[[int], bool], token_id: int) -> bool:
        try:
            return take(token_id)
        except Exception as error:
            self.fail(error)  # the reader's, like all that goes wrong with its request: others share this session
            return True

    @property
    def _is_reading(self) -> bool:
        return self._waiter is not None or self._is_called

    def _has_news(self) -> bool:
        return bool(self._tokens) or self._started is not None or self._loading is not None or self._end is not None

    def _gap(self, sequence: int) -> None:
        self.fail(EngineLostError(f"the engine skipped from token {self._expected} to {sequence}", had_request=True))

    def _overflow(self) -> None:
        self._tokens, self._logprobs, self._end = [], [], None
        self.is_ended = False
        self.fail(
            SlowConsumerError(
                f"the client left more than {self._max_buffered_tokens} tokens unread; read faster or ask for less",
                drop_reason="evicted",
            )
        )
        self._on_overflow(self)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
            self._is_called = True
