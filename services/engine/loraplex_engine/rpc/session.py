"""One gateway's session: its requests in, one message per engine step out.

Two halves share the outbox: `_read` turns the gateway's messages into commands, `responses` turns outputs into
messages. A request's fault ends that request, in-band. A fault of the gateway itself (no hello, a slot used twice) ends
the stream, since after it an answer could not be matched to its request.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex.v1 import engine_pb2
from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_engine.faults import internal_error
from loraplex_engine.messages import Abort, CloseSession, Ended, StepOutputs, Submit
from loraplex_engine.rpc import wire
from loraplex_engine.rpc.output_encoder import OutputEncoder
from loraplex_engine.rpc.request_spans import RequestSpans
from loraplex_engine.rpc.rule_making import PendingRules

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.loop.residency_feed import ResidencyFeed
    from loraplex_engine.metrics.requests import RequestMetrics
    from loraplex_engine.rpc.rule_making import RuleMaker
    from loraplex_engine.rpc.validation import RequestLimits

SUBMITS_PER_TURN: Final = 32
STALL_CHECKS: Final = 10

_log = get_logger()
_NO_TOKENS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionTimes:
    """How long a session waits.

    Attributes:
        grace_s: How long requests go on after the gateway has closed its half of the stream.
        max_silence_s: A message with the load goes out at least this often.
        max_stall_s: How long one write may wait for the gateway to read.
    """

    grace_s: float
    max_silence_s: float
    max_stall_s: float


class GatewaySession:
    """A session from its hello to its end.

    Args:
        engine: Takes the requests.
        feed: Gives the residency changes.
        limits: Limits of the served model.
        metrics: Is told of every request's milestones.
        rules: Makes what outputs must keep to.
        times: How long the session waits.
    """

    def __init__(
        self,
        engine: Engine,
        feed: ResidencyFeed,
        *,
        limits: RequestLimits,
        metrics: RequestMetrics,
        rules: RuleMaker,
        times: SessionTimes,
    ) -> None:
        self._engine = engine
        self._feed = feed
        self._limits = limits
        self._meter = metrics.open_session()
        self._times = times
        self._pending = PendingRules(
            rules,
            on_made=lambda submission, made: engine.post(Submit(replace(submission, rules=made))),
            on_end=self._end,
            clock=time.monotonic,
        )
        self._outbox = engine.open_session()
        self._encoder = OutputEncoder(lambda slot: engine.post(Abort(self._outbox.session_id, slot)))
        self._active: set[int] = set()
        self._spans = RequestSpans()
        self._is_input_over = False
        self._last_step = 0
        self._told: set[str] = set()  # adapters that the gateway knows to be on the device
        self._told_version: int | None = None
        self._num_writes = 0
        self._pending_write: int | None = None

    async def responses(
        self, requests: AsyncIterator[engine_pb2.SessionRequest]
    ) -> AsyncGenerator[engine_pb2.SessionResponse, None]:
        """Run the session.

        Raises:
            InvalidParameterError: If the gateway breaks the protocol.
            SlowConsumerError: If the gateway does not read.
        """
        handler = asyncio.current_task()
        assert handler is not None
        reader = asyncio.create_task(self._read_guarded(requests), name="session-reader")
        watchdog = asyncio.create_task(self._watch_stall(handler), name="session-watchdog")
        try:
            yield self._message()
            while (step := await self._next()) is not None:
                for message in step:
                    self._num_writes += 1
                    self._pending_write = self._num_writes
                    yield message
                    self._pending_write = None
                if self._is_input_over and not self._active:
                    return
        finally:
            self._outbox.close()
            self._engine.post(CloseSession(self._outbox.session_id))
            self._meter.close()
            self._spans.close()
            await cancel_and_wait(reader, watchdog, *self._pending.forget_all())

    def close(self, error: LoraplexError) -> None:
        """End the session from the engine's side; what is pending is still sent."""
        self._outbox.close(error)

    async def _next(self) -> list[engine_pb2.SessionResponse] | None:
        """Wait for outputs, or until the next message is due; None at the end."""
        try:
            async with asyncio.timeout(self._times.max_silence_s):
                outputs = await self._outbox.next()
        except TimeoutError:
            return [self._message()]
        if outputs is None:
            return None
        self._meter.record(outputs, time.monotonic())
        for event in outputs.events:
            if isinstance(event, Ended):
                self._active.discard(event.session_slot)
                self._spans.end(event)
        self._last_step = max(self._last_step, outputs.step_id)
        messages = list(self._encoder.encode(outputs))
        for message in messages:
            message.step = self._last_step
        self._add_state(messages[-1])
        return messages

    def _message(self) -> engine_pb2.SessionResponse:
        message = engine_pb2.SessionResponse(step=self._last_step)
        self._add_state(message)
        return message

    def _add_state(self, message: engine_pb2.SessionResponse) -> None:
        message.load.CopyFrom(wire.load_report(self._engine.snapshot()))
        if self._told_version != self._feed.resident_version:
            now = self._feed.resident
            message.residency.snapshot = self._told_version is None
            message.residency.added.extend(now - self._told)
            message.residency.removed.extend(self._told - now)
            self._told, self._told_version = set(now), self._feed.resident_version

    async def _read_guarded(self, requests: AsyncIterator[engine_pb2.SessionRequest]) -> None:
        try:
            await self._read(requests)
        except LoraplexError as error:
            self._outbox.close(error)
            return
        except Exception as error:  # the gateway's messages are not read any more: end the session
            self._outbox.close(internal_error("while the session was read", error, session=self._outbox.session_id))
            return
        self._is_input_over = True
        if self._active:
            await asyncio.sleep(self._times.grace_s)
            for slot in self._active:
                self._abort(slot)
        else:
            self._outbox.close()

    async def _read(self, requests: AsyncIterator[engine_pb2.SessionRequest]) -> None:
        is_first = True
        async for request in requests:
            if request.HasField("hello") != is_first:
                raise InvalidParameterError(
                    "hello: the first message of a session, and only the first, has it", field="hello"
                )
            if is_first:
                _log.info("session opened", gateway=request.hello.gateway_id, session=self._outbox.session_id)
                is_first = False
            for number, submit in enumerate(request.submits, start=1):
                self._submit(submit)
                if number % SUBMITS_PER_TURN == 0:
                    await asyncio.sleep(0)  # a thousand requests in one message must not delay the tokens
            for abort in request.aborts:
                # An unknown slot is no error: the request's end and the gateway's abort may have crossed.
                if abort.slot in self._active:
                    self._abort(abort.slot)

    def _submit(self, submit: engine_pb2.Submit) -> None:
        if submit.slot in self._active:
            raise InvalidParameterError(f"slot {submit.slot} is in use by a running request", field="submits.slot")
        now_s = time.monotonic()
        try:
            submission = wire.submission(submit, session_id=self._outbox.session_id, limits=self._limits, now_s=now_s)
        except LoraplexError as error:
            self._refuse(submit.slot, error)
            return
        except Exception as error:
            failure = internal_error("while it was read", error, request_id=submit.request_id)
            self._refuse(submit.slot, failure)
            return
        submission = self._spans.begin(submission, submit.traceparent)
        self._active.add(submit.slot)
        self._meter.submitted(submit.slot, len(submission.prompt_token_ids), now_s, submission.stopping.max_new_tokens)
        if submission.sampling.prompt_logprobs >= 0:
            self._encoder.expect_prompt_logprobs(submit.slot)
        if submission.structured_output is not None or submission.bad_token_sequences:
            self._pending.begin(submission)
        else:
            self._engine.post(Submit(submission))

    def _abort(self, slot: int) -> None:
        if not self._pending.abort(slot):
            self._engine.post(Abort(self._outbox.session_id, slot))

    def _refuse(self, slot: int, error: LoraplexError) -> None:
        self._end(Ended(session_slot=slot, error=error))

    def _end(self, ended: Ended) -> None:
        """Answer a request that never reached the step loop, in order with the loop's own answers."""
        self._outbox.put(
            StepOutputs(
                step_id=0,
                token_slots=_NO_TOKENS,
                token_positions=_NO_TOKENS,
                token_ids=_NO_TOKENS,
                events=[ended],
            )
        )

    async def _watch_stall(self, handler: asyncio.Task[object]) -> None:
        """Reset the stream once a write has waited too long: a status would queue behind the bytes that are not read.

        It counts checks, not seconds: while this process does not run, the gateway is not at fault.
        """
        checks, watched = 0, None
        while True:
            await asyncio.sleep(self._times.max_stall_s / STALL_CHECKS)
            checks = checks + 1 if watched is not None and watched == self._pending_write else 0
            watched = self._pending_write
            if checks >= STALL_CHECKS:
                _log.warning("gateway does not read its session", session=self._outbox.session_id)
                handler.cancel()
                return
