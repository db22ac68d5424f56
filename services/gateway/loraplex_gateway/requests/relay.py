"""Carries one request over as many engines as it takes: what was emitted never changes, the rest comes from another."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    DeadlineError,
    DrainingError,
    EngineHungError,
    EngineOomError,
    LoraplexError,
    NoEngineError,
    QueueTimeoutError,
    RequestLostError,
    StreamInterruptedError,
)
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_gateway.engines.ticket import EngineLostError, EngineUpdate, LocalCancelError
from loraplex_gateway.engines.wire import EngineFinish, Submission
from loraplex_gateway.types import FinishReason, Timings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from loraplex_gateway.adapters.prefetch import PrefetchHints
    from loraplex_gateway.engines.link import EngineLink
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.engines.ticket import Ticket
    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.requests.claims import RunningRequest

MAX_REFUSALS: Final = 4
"""Engines that may refuse a request between two of its tokens, each for reasons of its own."""
MAX_FRUITLESS_LOSSES: Final = 2
"""Sessions in a row that may be lost with a request before it has given a token there.

Seen from here, a request that ends its engine's session and one that is unlucky look alike. What tells them apart is
progress: who gets tokens survives engine after engine, as before; who has twice gone down with a session without any is
not sent a third time, as every attempt interrupts all others' streams there.
"""
FIRST_WAIT_S: Final = 5.0
"""For an engine that is being dialled, of a request that no engine has had yet; the others wait as the pool says."""
# After the deadline, for the engine's own verdict to arrive.
ENGINE_DEADLINE_SLACK_S: Final = 2.0
# What an engine refuses that another may take.
ELSEWHERE: Final = (DrainingError, NoEngineError, EngineOomError, EngineHungError)

_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prepared request.

    Attributes:
        submission: What every engine gets; durations in it are ignored, the instants below count.
        fingerprint: Base model, which picks the set of engines.
        stop_token_ids: Ids that end the output, end-of-text included if it counts.
        deadline: When the caller's deadline passes (monotonic), less a margin.
        queue_deadline: When queue_timeout passes.
        time_limit_at: When the output is cut.
        resumed_ids: What the client has of the output, if it resumes a stream that had started.
    """

    submission: Submission
    fingerprint: str
    affinity_key: str
    stop_token_ids: frozenset[int]
    max_new_tokens: int
    deadline: float | None
    queue_deadline: float | None
    time_limit_at: float | None
    resumed_ids: tuple[int, ...] | None = None

    @property
    def expected_tokens(self) -> tuple[int, int]:
        """Tokens that count against the tenant's quota: of what an engine has to read, and of the output at most.

        Of a resumed stream that is its prompt and what its client says it has of the output, all again: nobody knows how often
        a token has been used, and tokens that an engine reads for nothing would be a way around the quota.
        """
        num_resumed = len(self.resumed_ids or ())
        return len(self.submission.prompt_ids) + num_resumed, max(0, self.max_new_tokens - num_resumed)


class EngineRelay:
    """Submits a job and yields what engines say about it until its end.

    Args:
        job: The request.
        pool: The engines.
        running: Handle that CancelRequest uses.
        hints: Told when the chosen engine lacks the adapter; None without an adapter store.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        job: Job,
        *,
        pool: EnginePool,
        running: RunningRequest,
        hints: PrefetchHints | None,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._job = job
        self._pool = pool
        self._running = running
        self._hints = hints
        self._metrics = metrics
        self._clock = clock
        self._tokens: list[int] = list(job.resumed_ids or ())
        self._has_started = job.resumed_ids is not None
        self._excluded: frozenset[str] = frozenset()
        self._num_fruitless_losses = 0
        self._num_refusals = 0

    async def updates(self) -> AsyncGenerator[tuple[str, EngineUpdate], None]:
        """Yield (engine id, news); the last update has a normal end.

        Closing the generator aborts the request on its engine within one loop tick.

        Raises:
            LoraplexError: What the engine ended the request with.
            NoEngineError: If no engine took it.
            RequestLostError: If sessions end whenever it is sent.
            StreamInterruptedError: If its engine died after output began and no other took over.
            LocalCancelError: If it was cancelled by its id.
        """
        failure: Exception | None = None
        while True:
            link = await self._choose(failure)
            if link is None:
                yield "", EngineUpdate(end=unsaid_finish(FinishReason.TIME_LIMIT))
                return
            num_tokens = len(self._tokens)
            try:
                # Closed here and now: the abort on the engine hangs on the generator's `finally`.
                async with aclosing(self._run_on(link)) as updates:
                    async for update in updates:
                        yield link.engine_id, update
                if failure is not None and self._has_started:
                    self._metrics.resumes.labels("ok").inc()
                return
            except (EngineLostError, *ELSEWHERE) as error:
                failure = error
            self._count(failure, link.engine_id, has_progressed=len(self._tokens) > num_tokens)
            if (finish := finish_reached(self._job, self._tokens)) is not None:
                yield link.engine_id, EngineUpdate(end=finish)
                return
            if self._num_fruitless_losses >= MAX_FRUITLESS_LOSSES:
                raise self._lost(failure)
            if self._num_refusals >= MAX_REFUSALS:
                raise self._give_up(failure)
            self._note_retry(link.engine_id, failure)

    async def _run_on(self, link: EngineLink) -> AsyncGenerator[EngineUpdate, None]:
        digest = self._job.submission.adapter_digest
        if self._hints is not None and digest and digest not in link.resident:
            self._hints.hint(digest, link.engine_id)
        ticket = link.submit(self._submission(link.record.max_model_len))

        def cancel() -> None:
            ticket.cancel()
            link.release(ticket)  # now: whoever reads the ticket may hang in a write to a client that is gone

        self._running.on_cancel(cancel)
        overdue = self._watch_deadline(ticket)
        try:
            while True:
                update = await ticket.next()
                self._tokens += update.token_ids
                self._has_started = self._has_started or bool(update.token_ids) or update.started is not None
                yield update
                if update.end is not None:
                    return
        finally:
            self._running.on_cancel(None)
            if overdue is not None:
                overdue.cancel()
            link.release(ticket)

    def _watch_deadline(self, ticket: Ticket) -> asyncio.TimerHandle | None:
        """End the request if its engine lets the deadline pass: one that hangs keeps its connection alive for ever."""
        deadline = self._job.deadline
        if deadline is None:
            return None
        delay_s = max(0.0, deadline - self._clock()) + ENGINE_DEADLINE_SLACK_S
        error = DeadlineError("the deadline passed and the engine did not end the request")
        return asyncio.get_running_loop().call_later(delay_s, ticket.fail, error)

    def _count(self, failure: Exception, engine_id: str, *, has_progressed: bool) -> None:
        """Take in that an engine did not bring the request to its end; a new token clears the account."""
        if has_progressed:
            self._num_fruitless_losses = self._num_refusals = 0
            self._excluded = frozenset()
        if not isinstance(failure, EngineLostError):
            self._num_refusals += 1
            self._excluded |= {engine_id}
        elif not has_progressed:
            self._num_fruitless_losses += failure.had_request

    async def _choose(self, cause: Exception | None) -> EngineLink | None:
        """Return an engine, waiting for one while some is expected; None once the request's time limit has passed."""
        job = self._job
        first_until = self._clock() + FIRST_WAIT_S
        while True:
            changed = self._pool.changed
            link = self._pool.choose(
                job.fingerprint,
                adapter_digest=job.submission.adapter_digest,
                affinity_key=job.affinity_key,
                num_tokens=len(job.submission.prompt_ids) + len(self._tokens),
                excluded=self._excluded,
            )
            if link is not None:
                return link
            until = self._pool.expected_until(job.fingerprint)
            if cause is None:
                first = first_until if self._pool.is_expected(job.fingerprint) else -math.inf
                until = max(until, first) if self._has_started else first
            now = self._clock()
            if job.time_limit_at is not None and job.time_limit_at <= min(now, job.deadline or now):
                return None
            limits = (job.deadline, job.time_limit_at, None if self._has_started else job.queue_deadline)
            left_s = min(until, *(limit for limit in limits if limit is not None)) - now
            if left_s <= 0:
                raise self._give_up(cause)
            await self._wait(changed, left_s)

    async def _wait(self, changed: asyncio.Event, timeout_s: float) -> None:
        """Wait for a change among the engines, a while at most.

        Raises:
            LocalCancelError: If the request is cancelled by its id meanwhile.
        """
        cancelled = asyncio.Event()
        self._running.on_cancel(cancelled.set)
        waits = [asyncio.create_task(event.wait()) for event in (changed, cancelled)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._running.on_cancel(None)
            await cancel_and_wait(*waits)
        if cancelled.is_set():
            raise LocalCancelError

    def _note_retry(self, lost_engine_id: str, cause: Exception) -> None:
        self._metrics.retries.inc()
        _log.warning(
            "resubmitting a request to another engine",
            request_id=self._job.submission.request_id,
            lost_engine_id=lost_engine_id,
            num_tokens=len(self._tokens),
            cause=str(cause),
        )

    def _submission(self, max_model_len: int) -> Submission:
        """Return the submission for an engine at this moment, output so far included."""
        now, job = self._clock(), self._job

        def left_s(instant: float | None) -> float | None:
            return None if instant is None else max(instant - now, 0.001)

        room = max_model_len - len(job.submission.prompt_ids)
        return replace(
            job.submission,
            resumed_ids=tuple(self._tokens),
            prompt_logprobs=None if self._has_started else job.submission.prompt_logprobs,
            fail_fast=job.submission.fail_fast and not self._has_started,
            stopping=replace(job.submission.stopping, max_new_tokens=min(job.max_new_tokens, room)),
            time_left_s=left_s(job.deadline),
            queue_timeout_s=None if self._has_started else left_s(job.queue_deadline),
            time_limit_s=left_s(job.time_limit_at),
        )

    def _lost(self, cause: Exception) -> LoraplexError:
        if self._has_started:
            self._metrics.resumes.labels("failed").inc()
        return RequestLostError(
            f"the sessions of {self._num_fruitless_losses} engines ended after this request was sent and before it gave "
            f"a token; it is not sent again. The last one: {cause}",
            metadata={"output_tokens": str(len(self._tokens))},
        )

    def _give_up(self, cause: Exception | None) -> LoraplexError:
        if self._job.deadline is not None and self._clock() >= self._job.deadline:
            return DeadlineError("the deadline passed before an engine took the request")
        queue_deadline = None if self._has_started else self._job.queue_deadline
        if queue_deadline is not None and self._clock() >= queue_deadline:
            return QueueTimeoutError(
                "queue_timeout passed before an engine took the request",
                retry_after_s=1.0,
                drop_reason="rejected-ttl-expired",
            )
        if self._has_started:
            self._metrics.resumes.labels("failed").inc()
            return StreamInterruptedError(
                f"the engine was lost after {len(self._tokens)} tokens and no other could take over",
                metadata={"output_tokens": str(len(self._tokens))},
            )
        if isinstance(cause, LoraplexError):
            return cause
        return NoEngineError(
            "no engine of this base model is ready; try again",
            retry_after_s=1.0,
            drop_reason="rejected-no-endpoints",
        )


def finish_reached(job: Job, tokens: Sequence[int]) -> EngineFinish | None:
    """Return the end if an engine that is lost had emitted the last token but not said so."""
    if not tokens:
        return None
    if tokens[-1] in job.stop_token_ids and len(tokens) > (job.submission.stopping.min_new_tokens or 0):
        return unsaid_finish(FinishReason.STOP, stop_token_id=tokens[-1])
    return unsaid_finish(FinishReason.LENGTH) if len(tokens) >= job.max_new_tokens else None


def unsaid_finish(reason: FinishReason, *, stop_token_id: int | None = None) -> EngineFinish:
    """Return an end that no engine has said; times are measured here."""
    return EngineFinish(reason=reason, stop_token_id=stop_token_id, timings=Timings())
