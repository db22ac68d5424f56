"""Carries one request over as many engines as it takes: what was emitted never changes, the rest comes from another."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    DeadlineError,
    LoraplexError,
    NoEngineError,
    QueueTimeoutError,
    StoreUnavailableError,
    StreamInterruptedError,
)
from loraplex_common.log import get_logger
from loraplex_common.numerics import spoken
from loraplex_common.tasks import cancel_and_wait

from loraplex_gateway.engines.ticket import EngineLostError, EngineUpdate, LocalCancelError
from loraplex_gateway.requests.attempts import OUTAGE_PAUSE_S, Attempts
from loraplex_gateway.requests.engine_wait import expected_until
from loraplex_gateway.requests.prepared import unsaid_finish
from loraplex_gateway.requests.submitting import submission_of
from loraplex_gateway.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from loraplex_gateway.adapters.prefetch import PrefetchHints
    from loraplex_gateway.engines.link import EngineLink
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.engines.ticket import Ticket
    from loraplex_gateway.engines.wire import Submission
    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.requests.claims import Claim
    from loraplex_gateway.requests.run import RequestRun
    from loraplex_gateway.requests.tap import Tap

# After the deadline, for the engine's own verdict to arrive.
ENGINE_DEADLINE_SLACK_S: Final = 2.0

_log = get_logger()


class EngineRelay:
    """Submits a request and yields what engines say about it until its end.

    Args:
        run: The request.
        claim: Tells when it is cancelled by its id.
        pool: The engines.
        hints: Told when the chosen engine lacks the adapter; None without an adapter store.
        metrics: Where moves between engines are counted.
        tap: Takes plain tokens the short way; None has all go the long one.
    """

    def __init__(
        self,
        run: RequestRun,
        claim: Claim,
        *,
        pool: EnginePool,
        hints: PrefetchHints | None,
        metrics: GatewayMetrics,
        tap: Tap | None = None,
    ) -> None:
        self._run, self._tap = run, tap
        self._prepared, self._clock = run.prepared, run.times.clock
        self._time_limit_at = run.time_limit_at
        self._claim, self._pool = claim, pool
        self._hints, self._metrics = hints, metrics
        self._tokens: list[int] = list(run.prepared.resumed_ids)
        self._has_started = run.prepared.continuation is not None
        self._was_interrupted, self._resumed = False, "ok"
        self._attempts = Attempts(clock=self._clock, outage_s=pool.failover_wait_s)

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
        try:
            while True:
                link = await self._choose(failure)
                if link is None:
                    self._resumed = "time_limit"
                    yield "", EngineUpdate(end=unsaid_finish(FinishReason.TIME_LIMIT))
                    return
                num_tokens = len(self._tokens)
                try:
                    with self._submitted(link) as ticket:
                        while True:
                            update = await ticket.next()
                            self._tokens += update.token_ids
                            self._has_started = (
                                self._has_started or bool(update.token_ids) or update.started is not None
                            )
                            yield link.engine_id, update
                            if update.end is not None:
                                return
                except (EngineLostError, LoraplexError) as error:
                    if not self._attempts.may_follow(error, has_begun=self._has_started):
                        raise
                    failure = error
                self._count(failure, link.engine_id, has_progressed=len(self._tokens) > num_tokens)
                if (finish := self._prepared.finish_reached(self._tokens)) is not None:
                    yield link.engine_id, EngineUpdate(end=finish)
                    return
                self._check_worth_another(failure)
                self._note_retry(link.engine_id, failure)
                if isinstance(failure, StoreUnavailableError):
                    await self._outlast(failure)
        finally:
            if self._was_interrupted and self._run.is_finished:
                self._metrics.resumes.labels(self._resumed).inc()

    @contextmanager
    def _submitted(self, link: EngineLink) -> Iterator[Ticket]:
        """Have the request on an engine for as long as the block runs."""
        if self._hints is not None:
            self._hints.hint_missing(self._prepared.adapter_digests, link.resident, link.engine_id)
        ticket = link.submit(self._submission(link.record.max_model_len), self._run.account)
        self._run.numerics = link.record.numerics
        if self._tap is not None:
            self._tap.output, ticket.take = self._tokens, self._tap.take

        def cancel() -> None:
            ticket.cancel()
            link.release(ticket)  # now: the reader of the ticket may hang in a write to a client that is gone

        self._claim.on_cancel(cancel)
        overdue = self._watch_deadline(ticket)
        try:
            yield ticket
        finally:
            self._claim.on_cancel(None)
            overdue.cancel()
            link.release(ticket)

    def _watch_deadline(self, ticket: Ticket) -> asyncio.TimerHandle:
        """End the request if its engine lets the deadline pass: one that hangs keeps its connection alive for ever."""
        delay_s = max(0.0, self._prepared.deadline - self._clock()) + ENGINE_DEADLINE_SLACK_S
        error = DeadlineError("the deadline passed and the engine did not end the request")
        return asyncio.get_running_loop().call_later(delay_s, ticket.fail, error)

    def _count(self, failure: Exception, engine_id: str, *, has_progressed: bool) -> None:
        """Take in that an engine did not bring the request to its end; a new token clears the account."""
        self._was_interrupted = self._was_interrupted or self._has_started
        self._attempts.count(failure, engine_id, has_progressed=has_progressed)

    @property
    def _begun(self) -> str | None:
        """Numerics of the engine that the output began on; None if there is none or it is not known."""
        return self._run.numerics if self._has_started else None

    async def _choose(self, cause: Exception | None) -> EngineLink | None:
        """Return an engine, waiting for one while some is expected; None once the request's time limit has passed."""
        prepared = self._prepared
        fingerprint = prepared.model.fingerprint
        since = self._clock()
        while True:
            changed = self._pool.changed
            if self._has_started and self._is_cut_at(self._clock()):
                return None
            link = self._pool.choose(
                fingerprint,
                adapters=prepared.adapters,
                affinity_key=prepared.affinity_key,
                num_tokens=len(prepared.prompt_ids) + len(self._tokens),
                excluded=self._attempts.excluded,
                is_constrained=prepared.is_constrained,
                begun=self._begun,
            )
            if link is not None:
                return link
            until = expected_until(
                self._pool, fingerprint, since, begun=self._begun, is_first=cause is None, has_started=self._has_started
            )
            now = self._clock()
            if self._is_cut_at(now):
                return None
            limits = (self._time_limit_at, None if self._has_started else prepared.queue_deadline)
            left_s = min(until, prepared.deadline, *(limit for limit in limits if limit is not None)) - now
            if left_s <= 0:
                raise self._give_up(cause)
            with self._metrics.demand.waiting(fingerprint, len(prepared.prompt_ids) + len(self._tokens)):
                await self._wait(changed, left_s)

    async def _outlast(self, outage: StoreUnavailableError) -> None:
        """Wait before the request is sent once more while the adapter store is out of reach.

        Raises:
            DeadlineError: If the deadline comes first.
            LocalCancelError: If the request is cancelled by its id meanwhile.
        """
        limits = [limit for limit in (self._prepared.deadline, self._time_limit_at) if limit is not None]
        await self._wait(asyncio.Event(), max(0.0, min(OUTAGE_PAUSE_S, *(limit - self._clock() for limit in limits))))
        if not self._is_cut_at(now := self._clock()) and now >= self._prepared.deadline:
            raise self._give_up(outage)

    def _is_cut_at(self, now: float) -> bool:
        """Tell whether the output ends by its time limit, which comes before the deadline."""
        return self._time_limit_at is not None and self._time_limit_at <= min(now, self._prepared.deadline)

    async def _wait(self, changed: asyncio.Event, timeout_s: float) -> None:
        """Wait for a change among the engines, a while at most.

        Raises:
            LocalCancelError: If the request is cancelled by its id meanwhile.
        """
        cancelled = asyncio.Event()
        self._claim.on_cancel(cancelled.set)
        waits = [asyncio.create_task(event.wait()) for event in (changed, cancelled)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._claim.on_cancel(None)
            await cancel_and_wait(*waits)
        if cancelled.is_set():
            raise LocalCancelError

    def _note_retry(self, lost_engine_id: str, cause: Exception) -> None:
        self._metrics.retries.inc()
        _log.warning(
            "resubmitting a request to another engine",
            request_id=self._prepared.request.request_id,
            lost_engine_id=lost_engine_id,
            num_tokens=len(self._tokens),
            cause=str(cause),
        )

    def _submission(self, max_model_len: int) -> Submission:
        return submission_of(
            self._prepared,
            self._tokens,
            max_model_len=max_model_len,
            has_started=self._has_started,
            time_limit_at=self._time_limit_at,
            now=self._clock(),
        )

    def _check_worth_another(self, cause: Exception) -> None:
        """Raise what the request ends with if it has been lost or refused too often to be sent once more."""
        if self._attempts.is_suspect:
            if self._has_started:
                self._metrics.resumes.labels("failed").inc()
            raise self._attempts.lost(cause, num_tokens=len(self._tokens))
        if self._attempts.are_spent:
            raise self._give_up(cause)

    def _give_up(self, cause: Exception | None) -> LoraplexError:
        now, prepared = self._clock(), self._prepared
        if now >= prepared.deadline:
            return DeadlineError("the deadline passed before an engine took the request")
        if not self._has_started and prepared.queue_deadline is not None and now >= prepared.queue_deadline:
            return QueueTimeoutError(
                "queue_timeout passed before an engine took the request",
                retry_after_s=1.0,
                drop_reason="rejected-ttl-expired",
            )
        if self._has_started:
            self._metrics.resumes.labels("failed").inc()
            return self._interrupted(cause)
        if isinstance(cause, LoraplexError):
            return cause
        return NoEngineError(
            "no engine of this base model is ready; try again",
            retry_after_s=1.0,
            drop_reason="rejected-no-endpoints",
        )

    def _interrupted(self, cause: Exception | None) -> StreamInterruptedError:
        """Return what a stream ends with that no engine takes over."""
        why, metadata = "", {"output_tokens": str(len(self._tokens))}
        begun = self._begun
        if isinstance(cause, StoreUnavailableError):
            why = f": {cause}"
        elif begun is not None and (others := self._pool.unlike(self._prepared.model.fingerprint, begun)):
            named = ", ".join(map(spoken, others))
            why = (
                f": it began with numerics {spoken(begun)}, the engines that are left have {named}; send the request anew, or "
                "have its operator start gateways with --allow-mixed-numerics"
            )
            metadata |= {"numerics": begun, "other_numerics": ",".join(others)}
        return StreamInterruptedError(
            f"the engine was lost after {len(self._tokens)} tokens and no other could take over{why}", metadata=metadata
        )
