"""Decides what the next step computes and what its result means: pure accounting, no clock of its own, no threads.

``schedule`` hands out a plan, ``update`` takes the results in the same order; up to the runner's pipeline depth of
plans may be out in between. Decode inputs are always "the token last sampled", so a plan never waits for the previous
result. A request that turns out to have ended has at most ``depth - 1`` speculative tokens behind it, which are
dropped: its slot's occupancy has changed by then.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    AdapterLoadingError,
    DeadlineError,
    DrainingError,
    InvalidParameterError,
    LoraplexError,
    QueueTimeoutError,
)

from loraplex_engine.faults import internal_error
from loraplex_engine.limits import QueuePolicy, SchedulerLimits
from loraplex_engine.messages import FinishReason, ResidencyState, StepOutputs, Submission
from loraplex_engine.scheduler.deadlines import Deadlines, Limit
from loraplex_engine.scheduler.integrity import check_requests
from loraplex_engine.scheduler.parts import build_parts
from loraplex_engine.scheduler.request import Request, RequestFaultError, RequestState, make_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.scheduler.running_batch import LaunchedStep
    from loraplex_engine.scheduler.steady_decode import Draw
    from loraplex_engine.step import StepPlan, StepResult

FORETOLD_WEIGHT: Final = 0.5
"""Of a request: what an image that nobody asked for says about requests to come."""


class Scheduler:
    """Continuous batching with chunked prefill over one pool of KV and adapter pages.

    Args:
        limits: Sizes.
        pool: Pages.
        cache: Adapters, over the same pool.
        page_bytes: Of the pool; for progress in bytes.
        clock: Seconds, monotonic.

    Attributes:
        counters: What happened so far.
        costs: What steps take, measured.
        queue: Waiting requests.
        batch: Running requests.
        prefix: Blocks that requests share.
    """

    def __init__(
        self,
        *,
        limits: SchedulerLimits,
        pool: PagePool,
        cache: AdapterCache,
        page_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._cache = cache
        self._clock = clock
        self._deadlines = Deadlines()
        self._in_flight: deque[LaunchedStep] = deque()
        self._num_submitted = 0
        self._next_step = 0
        self._is_draining = False
        parts = build_parts(limits=limits, pool=pool, cache=cache, page_bytes=page_bytes, clock=clock)
        self.counters = parts.counters
        self.costs = parts.costs
        self.queue = parts.queue
        self.batch = parts.batch
        self.prefix = parts.prefix
        self._collector = parts.collector
        self._book = parts.book
        self._reader = parts.reader
        self._sizes = parts.sizes
        self._first_tokens = parts.first_tokens
        self._fetching = parts.fetching
        self._admission = parts.admission
        self._growth = parts.growth
        self._warming = parts.warming
        self._steady = parts.steady

    # --- requests ---

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._book)

    @property
    def is_draining(self) -> bool:
        """True once new requests are refused."""
        return self._is_draining

    @property
    def next_deadline_s(self) -> float:
        """When a limit of some request passes next; infinity if none has any."""
        return min(self._deadlines.next_s, self._admission.next_look_s)

    def submit(self, submission: Submission) -> None:
        """Take a request; it ends in exactly one `Ended`.

        Raises:
            SlotInUseError: If the session has an open request of this number.
        """
        now_s = self._clock()
        policy = self._limits.policy
        try:
            request = make_request(
                submission,
                number=self._num_submitted,
                now_s=now_s,
                max_model_len=self._limits.max_model_len,
                ttft_slo_s=None if policy.queue_policy is QueuePolicy.FCFS else policy.ttft_slo_s,
            )
        except Exception as error:  # nothing holds anything of it yet
            doing = "while it was taken in"
            self._book.refuse(submission, internal_error(doing, error, request_id=submission.request_id))
            return
        self._book.open(request)
        self._num_submitted += 1
        with self._book.answering_for(request, "while it was taken in"):
            self._take_in(request, now_s)

    def _take_in(self, request: Request, now_s: float) -> None:
        if self._is_draining:
            self._book.fail(
                request, DrainingError("this engine is shutting down", drop_reason="rejected-shutting-down")
            )
        elif request.num_prompt_tokens >= self._limits.max_model_len:
            self._book.fail(request, self._prompt_too_long(request))
        elif len(request.output_token_ids) >= request.max_outputs:
            self._book.finish(request, FinishReason.LENGTH)
        elif not self._sizes.refuse_if_too_large(request):
            self._deadlines.add(request)
            self._watch_first_token(request)
            self._arrive(request, now_s)

    def _prompt_too_long(self, request: Request) -> LoraplexError:
        return InvalidParameterError(
            f"the prompt has {request.num_prompt_tokens} tokens; with at least one output token that exceeds the "
            f"longest sequence of {self._limits.max_model_len}",
            field="prompt",
        )

    def _arrive(self, request: Request, now_s: float) -> None:
        digest = request.adapter_digest
        if digest is not None:
            self._cache.states.count_arrival(digest)
        self._admission.arrive(request, now_s)
        if digest is None or request.state is RequestState.ENDED or self._is_resident(digest):
            return
        if request.submission.fail_fast:
            error = AdapterLoadingError(
                f"adapter {digest} is being loaded", retry_after_s=max(0.05, self._cache.ranking.costs.resident_s)
            )
            self._book.fail(request, error)
            if self._cache.state_of(digest) is ResidencyState.IN_ARENA:
                self._fetching.load_unattended(digest)
        else:
            self._book.report_loading(request, digest)

    def _is_resident(self, digest: str) -> bool:
        return self._cache.state_of(digest) is ResidencyState.RESIDENT

    def abort(self, session_id: int, session_slot: int) -> None:
        """End a request with CANCELLED; one that has ended already is let be."""
        request = self._book.find(session_id, session_slot)
        if request is not None:
            self._book.finish(request, FinishReason.CANCELLED)

    def close_session(self, session_id: int) -> None:
        """End all requests of a session; nothing is sent to it any more."""
        for request in [r for r in self._book.requests if r.submission.session_id == session_id]:
            self._book.finish(request, FinishReason.CANCELLED)
        self._collector.forget(session_id)

    def end_all(self, error: LoraplexError) -> int:
        """End all open requests with an error; returns how many."""
        requests = self._book.requests
        for request in requests:
            self._book.fail(request, error)
        return len(requests)

    def open_keys(self) -> list[tuple[int, int]]:
        """Return session and session slot of every request that has not ended."""
        return self._book.keys

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True

    # --- adapters ---

    def image_arrived(self, spec: AdapterSpec, arena_slots: tuple[int, ...]) -> None:
        """Take over an image in the arena and bring it on for those who wait."""
        state = self._cache.state_of(spec.digest)
        was_wanted = state is ResidencyState.WANTED
        if state is ResidencyState.ABSENT:  # it was foretold: by a hint, or by its use elsewhere
            self._cache.states.count_arrival(spec.digest, FORETOLD_WEIGHT)
        self._cache.image_arrived(spec, arena_slots)
        waiting = self.queue.of_adapter(spec.digest)
        for request in waiting:
            with self._book.answering_for(request, "when its adapter arrived"):
                if not self._sizes.refuse_if_too_large(request):
                    self._book.report_loading(request, spec.digest)
        if was_wanted and not waiting and self._cache.state_of(spec.digest) is ResidencyState.IN_ARENA:
            self._fetching.load_unattended(spec.digest)

    def image_refused(self, digest: str, error: LoraplexError) -> None:
        """End all requests that wait for an image that the store cannot supply."""
        if self._cache.state_of(digest) is not ResidencyState.WANTED:
            return
        self._cache.states.image_refused(digest)
        for request in self.queue.of_adapter(digest):
            self._book.fail(request, error)

    def load_refused(self, digest: str, error: LoraplexError) -> None:
        """End all requests that wait for an adapter that the runner cannot take."""
        self._cache.load_refused(digest)
        for request in self.queue.of_adapter(digest):
            self._book.fail(request, error)

    # --- steps ---

    def schedule(self) -> StepPlan | None:
        """Decide the next step; None if there is nothing to compute now. A plan handed out must be launched."""
        return self.plan(self.decide())

    def decide(self) -> Rows:
        """Make the decisions before a step: who ends, grows, gives way, is admitted, and what is loaded.

        Returns:
            The rows that draw another token; `plan` makes the step of them, or `skip` takes it with those after it.
        """
        now_s = self._clock()
        self._pass_deadlines(now_s)
        for digest in self._cache.states.take_changed():
            self.queue.unpark(digest, now_s)
        rows = self._growth.grow(self.batch.state.rows_to_decode(self.batch.rows))
        self._admission.admit(now_s)
        if not self._admission.is_reserving:
            self._warming.warm()
        return rows

    def plan(self, rows: Rows) -> StepPlan | None:
        """Make the step that was decided on, of ``rows`` and of prefills; None if there is nothing to compute now."""
        try:
            planned = self.batch.plan(self._next_step, rows, self._limits.max_num_batched_tokens, self._clock())
        except RequestFaultError as fault:
            # It is still in prefill, so not among the rows that decode.
            error = fault.__cause__ or fault
            request_id = fault.request.submission.request_id
            self._book.fail(
                fault.request, internal_error("while its next step was planned", error, request_id=request_id)
            )
            return self.plan(rows)
        if planned is None:
            return None
        plan, launched = planned
        self._in_flight.append(launched)
        self._book.last_launched = self._next_step
        self._next_step += 1
        return plan

    def update(self, result: StepResult) -> None:
        """Take in what the oldest plan in flight drew; news is in `take_outputs`.

        Raises:
            RuntimeError: If it is the result of another plan, or does not fit it.
        """
        step = self._in_flight.popleft()
        self._pool.complete(step.step_id)
        self._cache.complete(step.step_id)
        now_s = self._clock()
        self.costs.observe(launched_s=step.launched_s, done_s=now_s, num_prefill_tokens=step.num_prefill_tokens)
        self._reader.read(step, result, now_s)

    def take_outputs(self) -> dict[int, StepOutputs]:
        """Return and forget all news: session -> outputs."""
        return self._collector.take(max(0, self._next_step - 1))

    # --- many steps at once ---

    @property
    def horizon(self) -> int:
        """Decode steps from now on that are alike if nothing arrives, the last one ending a request; 0 if none are."""
        return 0 if self._in_flight else self._steady.horizon(self._clock())

    def skip(self, num_steps: int, draw: Draw, *, growth_s: float = 0.0) -> None:
        """Take up to `horizon` decode steps as launched and done, each ``growth_s`` longer than the one before it.

        For simulators: the clock stands at the end of the last of them, and `next_deadline_s` has not passed.
        """
        self._steady.take(num_steps, draw, self._clock(), growth_s)

    # --- ends ---

    def _pass_deadlines(self, now_s: float) -> None:
        for limit, request in self._deadlines.pop_passed(now_s):
            if request.state is RequestState.ENDED:
                continue  # an earlier limit of this very turn
            with self._book.answering_for(request, "when a limit of its time passed"):
                self._pass_limit(limit, request, now_s)

    def _pass_limit(self, limit: Limit, request: Request, now_s: float) -> None:
        if limit is Limit.DEADLINE:
            self._book.fail(request, DeadlineError("the client's deadline passed"))
        elif limit is Limit.FIRST_TOKEN:
            if not self._first_tokens.end_if_unreachable(request, now_s) and request.state is RequestState.WAITING:
                self._watch_first_token(request)
        elif limit is Limit.TIME_LIMIT:
            self._book.finish(request, FinishReason.TIME_LIMIT)
        elif request.admitted_s is None:
            error = QueueTimeoutError(
                f"no place in a batch within {now_s - request.arrived_s:.3f} s",
                retry_after_s=1.0,
                drop_reason="rejected-ttl-expired",
            )
            self._book.fail(request, error)

    def _watch_first_token(self, request: Request) -> None:
        """Look at a request again at the moment from which it misses its objective."""
        unreachable_s = self._first_tokens.unreachable_from_s(request)
        if unreachable_s is not None:
            self._deadlines.note(unreachable_s, Limit.FIRST_TOKEN, request)

    def check_integrity(self) -> None:
        """Recount pages, leases and requests.

        Raises:
            RuntimeError: If something is lost or counted twice.
        """
        self._pool.check_integrity()
        self._cache.check_integrity()
        self.prefix.check_integrity()
        check_requests(pool=self._pool, cache=self._cache, batch=self.batch, queue=self.queue, book=self._book)
