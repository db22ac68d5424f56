"""How a stream goes on when its connection or its gateway is lost; shared by both clients, does no I/O."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final

import grpc
from loraplex_common.errors import (
    CancelledRequestError,
    LoraplexError,
    RequestRunningError,
    StreamInterruptedError,
)

from loraplex_client import _responses
from loraplex_client._gateways import can_help_elsewhere, is_bare, is_leaving
from loraplex_client.events import Chunk, Event, Started

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex.v1 import gateway_pb2

PATIENCE_S: Final = 60.0
"""How long a stream that has begun is tried again without a new token."""
FIRST_PATIENCE_S: Final = 10.0
"""How long a stream that has not begun is tried again: gateways may be away together for a moment, and one that died holds the
request's id for some seconds.
"""
FIRST_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 2.0
# What gRPC and proxies say of a connection that was cut.
CUT: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


class SequenceBrokenError(StreamInterruptedError):
    """A chunk is missing, or came twice."""


class StreamProgress:
    """What the user of a stream has been given, and what to ask for when it breaks.

    Args:
        request: What was asked for; belongs to this object from now on.
        timeout_s: Deadline of the whole stream, from now.
        resumes: Whether to go on after a break.
        owns_id: Whether the request's id was drawn here: a request that runs under it is then this stream's.
        has_choice: Whether there are other gateways for a stream that has not begun.
        clock: Monotonic seconds.

    Attributes:
        num_resumes: How often the stream has gone on after a break.
    """

    def __init__(
        self,
        request: gateway_pb2.GenerateRequest,
        *,
        timeout_s: float | None,
        resumes: bool,
        owns_id: bool,
        has_choice: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_resumes = 0
        self._request = request
        self._resumes, self._owns_id, self._has_choice = resumes, owns_id, has_choice
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._has_started = False
        self._has_started_now = False  # in the present attempt
        self._next_sequence = 0
        self._token_ids: list[int] = []
        self._num_text_bytes = 0
        self._resume_token = ""
        self._pause_s = FIRST_PAUSE_S
        self._give_up_at: float | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._request.request_id

    @property
    def time_left_s(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self._deadline is None else max(self._deadline - self._clock(), 0.001)

    def next_request(self) -> gateway_pb2.GenerateRequest:
        """Return what to send now: the request, and all that has come of it."""
        self._has_started_now = False
        if self._resume_token:
            self._request.progress_events = False  # it is past them
            resume = self._request.resume
            resume.resume_token = self._resume_token
            resume.last_sequence = max(self._next_sequence - 1, 0)
            del resume.token_ids[:]
            resume.token_ids.extend(self._token_ids)
            resume.num_text_bytes = self._num_text_bytes
        return self._request

    def take(self, response: gateway_pb2.GenerateResponse) -> Event | None:
        """Return the event of a message; None for what the user has seen or this version does not know.

        Raises:
            SequenceBrokenError: If a chunk is missing, or came twice.
        """
        event = _responses.event(response)
        if isinstance(event, Chunk):
            self._take_chunk(event)
        elif isinstance(event, Started):
            return self._take_start(event)
        return event

    def pause_s(self, error: LoraplexError, *, is_closed: bool) -> float:
        """Return how long to wait before the next attempt, and take what the error says of it.

        Args:
            error: What ended the last one.
            is_closed: Whether the client is closed, so that there can be no other.

        Raises:
            LoraplexError: ``error`` itself, if there is to be none.
        """
        if is_closed or not (self._resumes and self._is_worth_another(error)):
            raise error
        now = self._clock()
        if self._give_up_at is None:
            self._give_up_at = now + (PATIENCE_S if self._resume_token else FIRST_PATIENCE_S)
        give_up_at = self._give_up_at if self._deadline is None else min(self._give_up_at, self._deadline)
        pause_s = max(self._pause_s * random.uniform(0.2, 1.0), error.retry_after_s or 0.0)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        if now + pause_s > give_up_at:
            raise error
        return pause_s

    def _take_start(self, started: Started) -> Started | None:
        self._resume_token = started.resume_token
        self._has_started_now = True
        if not self._has_started:
            self._has_started = True
            return started
        self.num_resumes += 1
        return None

    def _take_chunk(self, chunk: Chunk) -> None:
        if (chunk.sequence, chunk.index) != (self._next_sequence, len(self._token_ids)):
            raise SequenceBrokenError(
                f"chunk {chunk.sequence} at token {chunk.index} came where chunk {self._next_sequence} at token "
                f"{len(self._token_ids)} was due"
            )
        self._next_sequence += 1
        self._token_ids += chunk.token_ids
        self._num_text_bytes += len(chunk.text.encode())
        self._pause_s, self._give_up_at = FIRST_PAUSE_S, None

    def _is_worth_another(self, error: LoraplexError) -> bool:
        if self._resume_token:
            return is_interruption(error) or (not self._has_started_now and error.retry_after_s is not None)
        if self._has_started:
            return False  # its gateway resumes nothing
        if isinstance(error, RequestRunningError) and self._owns_id:
            # Our own first attempt. If it runs on, go on with it; what it said of the prompt would be lost, though.
            if not self._request.response_options.HasField("prompt_logprobs"):
                self._resume_token = error.metadata.get("resume_token", "")
            return True
        return is_leaving(error) or (self._has_choice and can_help_elsewhere(error))


def is_interruption(error: LoraplexError) -> bool:
    """Return whether a stream that had begun broke for no reason of its own."""
    if isinstance(error, _responses.UnknownFinishError):
        return False  # it would end so again
    if isinstance(error, StreamInterruptedError | CancelledRequestError):
        return True
    return error.code is grpc.StatusCode.UNAVAILABLE or (is_bare(error) and error.code in CUT)
