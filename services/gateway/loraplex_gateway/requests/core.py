"""The one way a request takes, whichever face it came in by.

prepare -> reserve (`quotas`) -> admit -> claim -> route and submit (`relay`) -> detokenise and stop (`output`) -> events.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    DeadlineError,
    LoraplexError,
    NotSupportedError,
    QueueTimeoutError,
    ResumeInvalidError,
    StreamInterruptedError,
)
from loraplex_common.ids import new_request_id

from loraplex_gateway.engines.ticket import LocalCancelError
from loraplex_gateway.requests.access_log import RequestRecord
from loraplex_gateway.requests.relay import EngineRelay
from loraplex_gateway.requests.run import RequestRun
from loraplex_gateway.types import Accepted, Queued

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.prefetch import PrefetchHints
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.quotas.calls import QuotaCall
    from loraplex_gateway.requests.admission import AdmissionController, Place
    from loraplex_gateway.requests.claims import RequestClaims, RunningRequest
    from loraplex_gateway.requests.preparation import Prepared, Preparer
    from loraplex_gateway.requests.resumption import Resumption
    from loraplex_gateway.text.models import ServedModel
    from loraplex_gateway.text.tokenization import Encoded
    from loraplex_gateway.types import Event, GenerationRequest, Prompt

QUEUED_EVERY_S: Final = 1.0


class GatewayCore:
    """Generates text.

    Args:
        preparer: Validates, resolves, tokenises.
        admission: Limits what runs and waits.
        claims: Keeps request ids unique.
        pool: The engines.
        resumption: Gives out resume tokens and takes them back.
        hints: Prefetch hints; None without an adapter store.
        metrics: Where requests are counted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        preparer: Preparer,
        admission: AdmissionController,
        claims: RequestClaims,
        pool: EnginePool,
        *,
        resumption: Resumption,
        hints: PrefetchHints | None,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._preparer = preparer
        self._admission = admission
        self._claims = claims
        self._pool = pool
        self._resumption = resumption
        self._hints = hints
        self._metrics = metrics
        self._clock = clock

    async def generate(
        self, request: GenerationRequest, *, caller: Principal, time_left_s: float | None, quota: QuotaCall
    ) -> AsyncGenerator[Event, None]:
        """Yield a request's events, the last of them `Finished`.

        Closing the generator aborts the request on its engine and gives back its place and claim.

        Args:
            request: What to generate.
            caller: Who asks.
            time_left_s: Until the caller's deadline; None for no deadline.
            quota: The call that this request is one of.

        Raises:
            LoraplexError: If the request is refused or fails.
        """
        if request.resume is None:  # else the token knows it
            request = replace(request, request_id=request.request_id or new_request_id())
        record = RequestRecord(
            request, tenant=caller.name, metrics=self._metrics, clock=self._clock, time_left_s=time_left_s
        )
        share = quota.share()
        run: RequestRun | None = None
        failure: LoraplexError | None = None
        try:
            self._admission.check_room()
            share.check()
            prepared = await self._prepare(request, caller=caller, time_left_s=time_left_s, record=record)
            record.model = prepared.model.name
            if prepared.adapter is not None:
                record.adapter, record.is_restricted = prepared.adapter.name, prepared.adapter.is_restricted
            reserve = partial(share.reserve, *prepared.job.expected_tokens)
            if request.resume is not None:  # it ends the stream that it takes over: not if it is refused itself
                await reserve()
            run = RequestRun(prepared, self._clock, token=partial(self._resumption.token, tenant=caller.name))
            meanwhile = reserve if request.resume is None and quota.is_limited else None
            async with aclosing(self._admit_and_run(run, caller.name, meanwhile)) as events:
                async for event in events:
                    record.see(event, num_tokens=run.num_tokens)
                    if run.is_finished:
                        share.settle(*run.used_tokens)  # before the caller knows, who may send the next one at once
                    yield event
        except LoraplexError as error:
            failure = error
            raise
        except Exception:
            failure = LoraplexError("unexpected error")  # logged, with its traceback, where it becomes a status
            raise
        finally:
            share.settle(*(run.used_tokens if run is not None else (0, 0)))
            record.end(failure)

    async def encode(self, model: ServedModel, prompt: Prompt, *, tenant: str) -> Encoded:
        """Return the token ids that `generate` would use; refuses as `Preparer.encode` does."""
        return await self._preparer.encode(model, prompt, tenant=tenant)

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """End a running request of the tenant; return whether there was one.

        Raises:
            NotSupportedError: If another gateway runs it.
        """
        running = self._claims.find(tenant, request_id)
        if running is not None:
            running.cancel()
            return True
        owner = await self._claims.owner(tenant, request_id)
        if owner is not None:
            raise NotSupportedError(
                f"request {request_id} runs on gateway {owner}; cancelling across gateways is not built yet, "
                "cancel the stream's RPC instead",
                metadata={"gateway_id": owner},
            )
        return False

    async def _prepare(
        self, request: GenerationRequest, *, caller: Principal, time_left_s: float | None, record: RequestRecord
    ) -> Prepared:
        """Return what is to be submitted, be it the rest of a stream that a client resumes."""
        resume = request.resume
        if resume is None:
            return await self._preparer.prepare(request, caller=caller, time_left_s=time_left_s)
        try:
            # First what costs nothing: a forged token has nobody's prompt tokenised.
            point = self._resumption.open(request, resume, tenant=caller.name)
            record.resumes(point.request_id, num_tokens=len(resume.token_ids))
            pinned = self._resumption.pinned(request, point)
            prepared = await self._preparer.prepare(pinned, caller=caller, time_left_s=time_left_s)
            return self._resumption.continued(prepared, resume, point)
        except ResumeInvalidError:
            self._metrics.client_resumes.labels("refused").inc()
            raise

    async def _admit_and_run(
        self, run: RequestRun, tenant: str, meanwhile: Callable[[], Awaitable[None]] | None
    ) -> AsyncGenerator[Event, None]:
        request = run.prepared.request
        place = self._admission.enter(run.prepared.job.submission.priority)
        takes_over = request.resume is not None
        try:
            holding = self._claims.hold(tenant, request.request_id, takes_over=takes_over, meanwhile=meanwhile)
            async with holding as running:
                running.find_resume_token = lambda: run.resume_token
                if request.progress_events:
                    yield Accepted(request_id=request.request_id)
                if not place.is_admitted:
                    self._hint_early(run)
                try:
                    async with aclosing(self._wait_for_place(place, run, running)) as waits:
                        async for queued in waits:
                            yield queued
                    async with aclosing(self._stream(run, running)) as events:
                        async for event in events:
                            yield event
                except LocalCancelError:
                    if running.failure is not None:
                        raise running.failure from None
                    for event in run.cancelled():
                        yield event
                except StreamInterruptedError as error:
                    if run.resume_token:
                        error.metadata["resume_token"] = run.resume_token
                    raise
        finally:
            place.leave()

    def _hint_early(self, run: RequestRun) -> None:
        """Have the adapter fetched while its request still waits, to where it would go now."""
        job = run.prepared.job
        digest = job.submission.adapter_digest
        if self._hints is None or not digest or self._pool.num_resident(digest):
            return
        link = self._pool.choose(
            job.fingerprint,
            adapter_digest=digest,
            affinity_key=job.affinity_key,
            num_tokens=len(job.submission.prompt_ids),
            excluded=frozenset(),
        )
        if link is not None:
            self._hints.hint(digest, link.engine_id)

    async def _wait_for_place(
        self, place: Place, run: RequestRun, running: RunningRequest
    ) -> AsyncGenerator[Queued, None]:
        """Wait until admitted, saying where the request stands if it wants to know."""
        job, outcome = run.prepared.job, "cancelled"
        instants = [at for at in (job.queue_deadline, job.deadline) if at is not None]
        running.on_cancel(lambda: place.give_up(LocalCancelError()))
        num_waiting = self._metrics.vllm.num_waiting
        num_waiting[run.prepared.model.name] += 1
        try:
            while not place.is_admitted:
                left_s = min(instants, default=float("inf")) - self._clock()
                if left_s <= 0:
                    outcome = "timeout"
                    raise self._timed_out(place, job.deadline)
                if run.prepared.request.progress_events:
                    yield Queued(position=place.position, estimated_wait_s=place.estimated_wait_s)
                    left_s = min(left_s, QUEUED_EVERY_S)
                await asyncio.wait({place.admitted}, timeout=None if left_s == float("inf") else left_s)
                if place.admitted.done():
                    place.admitted.result()
            outcome = "admitted"
            run.admitted()
        finally:
            running.on_cancel(None)
            num_waiting[run.prepared.model.name] -= 1
            self._metrics.queue_duration.labels(outcome).observe(self._clock() - run.arrived_at)

    def _timed_out(self, place: Place, deadline: float | None) -> LoraplexError:
        if deadline is not None and self._clock() >= deadline:
            return DeadlineError("the deadline passed while the request waited for a place")
        return QueueTimeoutError(
            f"queue_timeout passed with {place.position} requests ahead",
            retry_after_s=place.estimated_wait_s,
            drop_reason="rejected-ttl-expired",
        )

    async def _stream(self, run: RequestRun, running: RunningRequest) -> AsyncGenerator[Event, None]:
        if run.prepared.request.resume is not None:
            last = await run.replay(run.prepared.request.resume)
            self._metrics.client_resumes.labels("ended" if last else "continued").inc()
            for event in last:
                yield event
            if last:
                return
        relay = EngineRelay(
            run.prepared.job,
            pool=self._pool,
            running=running,
            hints=self._hints,
            metrics=self._metrics,
            clock=self._clock,
        )
        async with aclosing(relay.updates()) as updates:
            async for engine_id, update in updates:
                for event in run.events(engine_id, update):
                    yield event
                if run.is_finished:
                    return
