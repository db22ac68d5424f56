"""The one way a request takes, whichever API it came in by.

prepare -> enter a place (`admission`) -> claim the id (`claims`) while the quota is reserved (`quotas`) -> wait (`waiting`) ->
route and submit (`relay`) -> detokenise and stop (`run`, `output`) -> events.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError, NotSupportedError, ResumeInvalidError, StreamInterruptedError
from loraplex_common.ids import new_request_id

from loraplex_gateway.engines.ticket import LocalCancelError
from loraplex_gateway.requests.access_log import RequestRecord
from loraplex_gateway.requests.relay import EngineRelay
from loraplex_gateway.requests.request_span import begin_span
from loraplex_gateway.requests.run import RequestRun
from loraplex_gateway.requests.tap import Tap
from loraplex_gateway.requests.times import RequestTimes
from loraplex_gateway.requests.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.prefetch import PrefetchHints
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.engines.ticket import EngineUpdate
    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.quotas.calls import QuotaCall, QuotaShare
    from loraplex_gateway.requests.admission import AdmissionController, Place
    from loraplex_gateway.requests.claims import Claim, RequestClaims
    from loraplex_gateway.requests.preparation import Preparer
    from loraplex_gateway.requests.prepared import PreparedRequest
    from loraplex_gateway.requests.resumption import Resumption
    from loraplex_gateway.requests.tap import Sink
    from loraplex_gateway.text.models import ServedModel
    from loraplex_gateway.text.tokenization import Encoded
    from loraplex_gateway.types import Event, GenerationRequest, Prompt
    from loraplex_gateway.usage.ledger import UsageLedger


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

    Attributes:
        cancel_elsewhere: Has another process (gateway id, tenant, request id) end a request; tells whether it ran there.
        ledger: Where what requests use is written; None for nowhere.
    """

    cancel_elsewhere: Callable[[str, str, str], Awaitable[bool | None]] | None = None
    ledger: UsageLedger | None = None

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
    ) -> None:
        self._preparer = preparer
        self._admission = admission
        self._claims = claims
        self._pool = pool
        self._resumption = resumption
        self._hints = hints
        self._metrics = metrics

    async def generate(
        self,
        request: GenerationRequest,
        *,
        caller: Principal,
        time_left_s: float | None,
        quota: QuotaCall,
        sink: Sink | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yield a request's events, the last of them `Finished`.

        Closing the generator aborts the request on its engine and gives back its place and claim.

        Args:
            request: What to generate.
            caller: The principal that asks.
            time_left_s: Until the caller's deadline; None for no deadline.
            quota: The call that this request is one of.
            sink: Writes plain chunks to the client by itself, see `tap`; None has all of them yielded.

        Raises:
            LoraplexError: If the request is refused or fails.
        """
        record, share, run = self._record(request, caller, time_left_s), quota.share(), None
        with record:
            try:
                run = await self._begin(record, share, caller)
                tap = _tap(run, record, sink)
                async with self._holding(run, share, caller.name) as (place, claim):
                    try:
                        with Waiting(place, claim, run, self._metrics) as waiting:
                            while (news := await waiting.next()) is not None:
                                yield news
                        events = await self._replayed(run)
                    except LocalCancelError:
                        events = _cancelled(run, claim, tap)
                    async with aclosing(self._relay(run, claim, tap).updates()) as updates:
                        while True:
                            for event in events:
                                record.see(event, num_tokens=run.num_tokens)
                                if run.is_finished:
                                    # Before the caller knows: it may send its next request at once.
                                    share.settle(*run.used_tokens)
                                yield event
                            if run.is_finished:
                                return
                            try:
                                events = await _next(run, updates, tap)
                            except LocalCancelError:
                                events = _cancelled(run, claim, tap)
            finally:
                share.settle(*(run.used_tokens if run is not None else (0, 0)))

    async def voice(
        self, model: str, adapters: Mapping[str, str], *, caller: Principal, prompt: Prompt | None = None
    ) -> ServedModel:
        """Return a model as adapters speak, for `encode`; as `Preparer.voice`."""
        return await self._preparer.voice(model, adapters, caller=caller, prompt=prompt)

    async def encode(self, model: ServedModel, prompt: Prompt, *, tenant: str) -> Encoded:
        """Return the token ids that `generate` would use; refuses as `Preparer.encode` does."""
        return await self._preparer.encode(model, prompt, tenant=tenant)

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """End a running request of the tenant; return whether there was one.

        Raises:
            NotSupportedError: If another gateway runs it.
        """
        if await self.cancel_here(tenant, request_id):
            return True
        owner = await self._claims.owner(tenant, request_id)
        if owner is None or owner == self._claims.gateway_id:  # ours, without a request: it has just ended
            return False
        ended = await self.cancel_elsewhere(owner, tenant, request_id) if self.cancel_elsewhere is not None else None
        if ended is None:
            raise NotSupportedError(
                f"request {request_id} runs on gateway {owner}; cancelling across gateways is not built yet, "
                "cancel the stream's RPC instead",
                metadata={"gateway_id": owner},
            )
        return ended

    async def cancel_here(self, tenant: str, request_id: str) -> bool:
        """End a running request of the tenant in this process; return whether there was one."""
        running = self._claims.find(tenant, request_id)
        if running is not None:
            running.cancel()
        return running is not None

    def _record(self, request: GenerationRequest, caller: Principal, time_left_s: float | None) -> RequestRecord:
        """Return the record of a request that comes at this moment."""
        span = begin_span(request)
        request_id = request.request_id or (new_request_id() if request.resume is None else "")  # the token knows it
        traceparent = request.traceparent if span is None else span.traceparent
        request = replace(request, request_id=request_id, traceparent=traceparent)  # once: it takes as long as a span
        make = partial(RequestRecord, metrics=self._metrics, times=RequestTimes(), ledger=self.ledger)
        record = make(request, caller.name, time_left_s=time_left_s)
        record.span = span
        return record

    async def _begin(self, record: RequestRecord, share: QuotaShare, caller: Principal) -> RequestRun:
        """Return a request that is ready to ask for a place: all that can be refused before has been."""
        self._admission.check_room()
        share.check()
        prepared = await self._prepare(record, caller)
        record.prepared(prepared)
        if prepared.continuation is not None:  # it ends the stream that it takes over: not if it is refused itself
            await share.reserve(*prepared.expected_tokens)
        record.times.queued()
        token = partial(self._resumption.token, tenant=caller.name)
        return RequestRun(prepared, record.times, token=token, account=record.account)

    async def _prepare(self, record: RequestRecord, caller: Principal) -> PreparedRequest:
        """Return what is to be submitted, be it the rest of a stream that a client resumes."""
        request, resume = record.request, record.request.resume
        prepare = partial(
            self._preparer.prepare,
            caller=caller,
            arrived_at=record.times.arrived_at,
            time_left_s=record.time_left_s,
        )
        if resume is None:
            return await prepare(request)
        try:
            # First what costs nothing: the prompt of a forged token is not tokenised.
            point = self._resumption.open(request, resume, tenant=caller.name)
            record.resumes(point.request_id, num_tokens=len(resume.token_ids), usage_id=point.usage_id)
            continuation = self._resumption.continuation(request, resume, point)
            prepared = await prepare(self._resumption.pinned(request, point), continuation=continuation)
            self._resumption.check(prepared, resume, point)
        except ResumeInvalidError:
            self._metrics.client_resumes.labels("refused").inc()
            raise
        return prepared

    @asynccontextmanager
    async def _holding(self, run: RequestRun, share: QuotaShare, tenant: str) -> AsyncIterator[tuple[Place, Claim]]:
        """Give a request a place, in the queue or beyond, and its claim, for as long as the block runs."""
        request, is_resumed = run.prepared.request, run.prepared.continuation is not None
        reserve = None
        if share.call.is_limited and not is_resumed:
            reserve = partial(share.reserve, *run.prepared.expected_tokens)
        place = self._admission.enter(run.prepared.priority)
        try:
            holding = self._claims.hold(tenant, request.request_id, takes_over=is_resumed, meanwhile=reserve)
            async with holding as claim:
                claim.find_resume_token = lambda: run.resume_token
                if not place.is_admitted:
                    self._hint_early(run.prepared)
                yield place, claim
        except LoraplexError as error:
            run.prepared.name_adapters_in(error)
            if run.resume_token and isinstance(error, StreamInterruptedError):
                error.metadata["resume_token"] = run.resume_token
            raise
        finally:
            place.leave()

    def _hint_early(self, prepared: PreparedRequest) -> None:
        """Have the adapter fetched while its request still waits, to where it would go now."""
        missing = [digest for digest in prepared.adapter_digests if not self._pool.num_resident(digest)]
        if self._hints is None or not missing:
            return
        link = self._pool.choose(
            prepared.model.fingerprint,
            adapters=prepared.adapters,
            affinity_key=prepared.affinity_key,
            num_tokens=len(prepared.prompt_ids),
            excluded=frozenset(),
        )
        if link is not None:
            self._hints.hint_missing(missing, link.resident, link.engine_id)

    async def _replayed(self, run: RequestRun) -> Sequence[Event]:
        """Return the end of a resumed stream whose client has all its tokens; nothing of one that goes on."""
        resume = run.prepared.request.resume
        if resume is None:
            return ()
        last = await run.replay(resume)
        self._metrics.client_resumes.labels("ended" if last else "continued").inc()
        return last

    def _relay(self, run: RequestRun, claim: Claim, tap: Tap | None) -> EngineRelay:
        return EngineRelay(run, claim, pool=self._pool, hints=self._hints, metrics=self._metrics, tap=tap)


def _tap(run: RequestRun, record: RequestRecord, sink: Sink | None) -> Tap | None:
    """Return what takes plain tokens to the sink; None where each of them may be an end."""
    has_stops = bool(run.prepared.request.stopping.stop_strings)
    return None if sink is None or has_stops else Tap(run, record, sink)


async def _next(
    run: RequestRun, updates: AsyncGenerator[tuple[str, EngineUpdate], None], tap: Tap | None
) -> Sequence[Event]:
    """Return the events of the next news that the tap has not taken, behind those of what it has."""
    if tap is None:
        return run.events(*await anext(updates))
    tap.is_open = run.times.started_at is not None
    engine_id, update = await anext(updates)
    return [*tap.rest(), *run.events(engine_id, update)]


def _cancelled(run: RequestRun, claim: Claim, tap: Tap | None) -> Sequence[Event]:
    """Return the last events of a request that was ended by its id.

    Raises:
        LoraplexError: What it was ended with, if not by its owner.
    """
    if claim.failure is not None:
        raise claim.failure from None
    return [*(tap.rest() if tap is not None else ()), *run.cancelled()]
