"""Decides what the next step computes and what its result means: pure accounting, no clock of its own, no threads.

``schedule`` hands out a plan, ``update`` takes the results in the same order; up to ``depth`` plans, the runner's
pipeline depth, may be out in between. Decode inputs are always "the token last sampled", so a plan never waits for the
previous result. A request that turns out to have ended has at most ``depth - 1`` speculative tokens behind it, which
are dropped: by then, its slot's occupancy has changed.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from loraplex_engine.faults import internal_error
from loraplex_engine.messages import FinishReason, ResidencyState
from loraplex_engine.pages.prefix_cache import PrefixCache
from loraplex_engine.scheduler.adapter_fetching import AdapterFetching
from loraplex_engine.scheduler.admission import Admission
from loraplex_engine.scheduler.deadlines import TimeLimits
from loraplex_engine.scheduler.decode_growth import DecodeGrowth
from loraplex_engine.scheduler.decode_state import DecodeState
from loraplex_engine.scheduler.eviction import PageSources, one_market
from loraplex_engine.scheduler.fair_shares import FairShares
from loraplex_engine.scheduler.feasibility import Feasibility
from loraplex_engine.scheduler.intake import RequestIntake
from loraplex_engine.scheduler.integrity import check_requests
from loraplex_engine.scheduler.placement import Placement
from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
from loraplex_engine.scheduler.request import RequestFaultError
from loraplex_engine.scheduler.request_book import RequestBook
from loraplex_engine.scheduler.result_reader import ResultReader
from loraplex_engine.scheduler.ruled_rows import RuledRows
from loraplex_engine.scheduler.running_batch import RunningBatch
from loraplex_engine.scheduler.step_costs import StepCosts
from loraplex_engine.scheduler.waiting_queue import WaitingQueue
from loraplex_engine.scheduler.warming import Warming

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_common.errors import LoraplexError

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.constraints.output_rules import OutputRules
    from loraplex_engine.limits import EngineLimits, SchedulingPolicy
    from loraplex_engine.messages import StepOutputs, Submission
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.scheduler.running_batch import LaunchedStep
    from loraplex_engine.step import StepPlan, StepResult

FORETOLD_WEIGHT: Final = 0.5
"""Weight of an image that no request asked for, in the estimate of the adapter's arrival rate."""


class Scheduler:
    """Continuous batching with chunked prefill over one pool of KV and adapter pages.

    Args:
        limits: Sizes.
        pool: Pages.
        cache: Adapters, over the same pool.
        clock: Seconds, monotonic.
        page_sources: Makes the sources of pages when the pool is short: one market for KV and adapters, unless a
            benchmark compares another rule.

    Attributes:
        queue: Waiting requests.
        batch: Running requests.
        prefix: Blocks that requests share.
        book: All open requests, and their outputs.
        costs: Measured costs of steps.
        counters: Totals so far.
        kv_source: Where the pages of sequences come from.
        admission: Decides which request runs next.
        growth: Gives running requests their next page.
        warming: Loads likely adapters ahead.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        pool: PagePool,
        cache: AdapterCache,
        clock: Callable[[], float],
        page_sources: PageSources = one_market,
    ) -> None:
        self._limits, policy = limits, limits.policy
        self._pool, self._cache, self._clock = pool, cache, clock
        self.queue = _make_queue(policy)
        self.batch = RunningBatch(state=_make_state(limits), pool=pool)
        self.prefix = PrefixCache(pool, half_life_s=policy.half_life_s, page_worth=cache.ranking.page_worth)
        self.costs = StepCosts()
        sharing = PrefixSharing(prefix=self.prefix, state=self.batch.state, limits=limits)
        self.book = book = RequestBook(
            limits=limits, queue=self.queue, batch=self.batch, cache=cache, sharing=sharing, clock=clock
        )
        self.counters = book.counters
        self.kv_source, source = page_sources(pool, cache, self.prefix, self.costs, limits.block_tokens)
        feasibility = Feasibility(limits=limits, book=book, pool=pool, cache=cache, sharing=sharing, costs=self.costs)
        self._fetching = AdapterFetching(book=book, cache=cache, source=source, feasibility=feasibility)
        placement = Placement(limits=limits, book=book, pool=pool, cache=cache, source=self.kv_source, sharing=sharing)
        self.admission = admission = Admission(
            limits=limits, book=book, cache=cache, fetching=self._fetching, placement=placement, feasibility=feasibility
        )
        self.growth = DecodeGrowth(book=book, pool=pool, cache=cache, source=self.kv_source, admission=admission)
        self.warming = Warming(book=book, cache=cache, source=source, is_enabled=policy.enable_warming)
        self._time_limits = time_limits = TimeLimits(book=book, feasibility=feasibility)
        self._intake = RequestIntake(
            limits=limits, book=book, cache=cache, feasibility=feasibility, time_limits=time_limits, admission=admission
        )
        self._ruled = RuledRows(book)
        self._reader = ResultReader(book=book, sharing=sharing, ruled=self._ruled, eos_token_ids=limits.eos_token_ids)
        self._in_flight: deque[LaunchedStep] = deque()
        self._next_step = 0

    # --- requests ---

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self.book)

    @property
    def num_in_flight(self) -> int:
        """Plans handed out whose results have not come yet."""
        return len(self._in_flight)

    @property
    def is_draining(self) -> bool:
        """True once new requests are refused."""
        return self._intake.is_draining

    @property
    def next_deadline_s(self) -> float:
        """When the next limit of a request passes; infinity if no request has one."""
        return min(self._time_limits.next_s, self.admission.next_look_s)

    def submit(self, submission: Submission) -> None:
        """Take a request; it ends in exactly one `Ended`.

        Raises:
            SlotInUseError: If the session has an open request of this number.
        """
        self._intake.submit(submission, self._clock())

    def abort(self, session_id: int, session_slot: int) -> None:
        """End a request with CANCELLED; nothing happens if it has ended already."""
        request = self.book.find(session_id, session_slot)
        if request is not None:
            self.book.finish(request, FinishReason.CANCELLED)

    def close_session(self, session_id: int) -> None:
        """End all requests of a session; no more outputs are sent to it."""
        for request in [r for r in self.book.requests if r.submission.session_id == session_id]:
            self.book.finish(request, FinishReason.CANCELLED)
        self.book.outputs.forget(session_id)

    def end_all(self, error: LoraplexError) -> int:
        """End all open requests with an error; returns how many."""
        requests = self.book.requests
        for request in requests:
            self.book.fail(request, error)
        return len(requests)

    def open_keys(self) -> list[tuple[int, int]]:
        """Return session and session slot of every request that has not ended."""
        return self.book.keys

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self._intake.is_draining = True

    def stop_draining(self) -> None:
        """Take new requests again."""
        self._intake.is_draining = False

    # --- adapters ---

    def image_arrived(self, spec: AdapterSpec, arena_slots: tuple[int, ...]) -> None:
        """Take over an image in the arena; load it if a request wanted it, even if that request has ended."""
        state = self._cache.state_of(spec.digest)
        was_wanted = state is ResidencyState.WANTED
        if state is ResidencyState.ABSENT:  # it came ahead of any request: by a hint, or by its use elsewhere
            self._cache.states.count_arrival(spec.digest, FORETOLD_WEIGHT)
        self._cache.image_arrived(spec, arena_slots)
        is_awaited = self._fetching.image_arrived(spec.digest)
        if was_wanted and not is_awaited and self._cache.state_of(spec.digest) is ResidencyState.IN_ARENA:
            self.admission.load_unattended(spec.digest)

    def image_refused(self, digest: str, error: LoraplexError) -> None:
        """End all requests that wait for an image that the store cannot supply."""
        if self._cache.state_of(digest) is not ResidencyState.WANTED:
            return
        self._cache.states.image_refused(digest)
        for request in self.queue.of_adapter(digest):
            self.book.fail(request, error)

    def load_refused(self, digest: str, error: LoraplexError) -> None:
        """End all requests that wait for an adapter that the runner cannot take."""
        self._cache.load_refused(digest)
        for request in self.queue.of_adapter(digest):
            self.book.fail(request, error)

    # --- steps ---

    def schedule(self) -> StepPlan | None:
        """Decide the next step; None if there is nothing to compute now. A plan handed out must be launched."""
        return self.plan(self.decide())

    def decide(self) -> Rows:
        """Make the decisions before a step: which requests end, grow, are preempted or admitted, and what is loaded.

        Returns:
            The rows that draw another token; `plan` makes them a step.
        """
        now_s = self._clock()
        self._time_limits.end_overdue(now_s)
        for digest in self._cache.states.take_changed():
            self.queue.unpark(digest, now_s)
        rows = self.growth.grow(self.batch.state.rows_to_decode(self.batch.rows))
        self.admission.admit(now_s)
        if not self.admission.is_reserving:
            self.warming.warm()
        return rows

    def plan(self, rows: Rows) -> StepPlan | None:
        """Make the step of the decided ``rows`` and of prefills; None if there is nothing to compute now."""
        try:
            planned = self.batch.plan(self._next_step, rows, self._limits.max_num_batched_tokens, self._clock())
        except RequestFaultError as fault:
            # The request is still in prefill, so it is not among the rows that decode.
            error = fault.__cause__ or fault
            request_id = fault.request.submission.request_id
            self.book.fail(
                fault.request, internal_error("while its next step was planned", error, request_id=request_id)
            )
            return self.plan(rows)
        if planned is None:
            return None
        plan, launched = planned
        self._in_flight.append(launched)
        self.book.last_launched = self._next_step
        self._next_step += 1
        return plan

    def rules(self) -> list[OutputRules | None]:
        """Return the rules of the newest plan's masked rows, ``[M]``, once all earlier results were read; None: it has ended."""
        return self._ruled.rules(self._in_flight[-1])

    def fail_masked(self, error: LoraplexError) -> None:
        """End the requests of the newest plan's masked rows: their masks cannot be made."""
        self._ruled.fail(self._in_flight[-1], error)

    def update(self, result: StepResult) -> None:
        """Read the result of the oldest plan in flight; `take_outputs` then returns what it drew.

        Raises:
            RuntimeError: If the result is another plan's, or does not fit the plan.
        """
        step = self._in_flight.popleft()
        self._pool.complete(step.step_id)
        self._cache.complete(step.step_id)
        now_s = self._clock()
        self.costs.observe(launched_s=step.launched_s, done_s=now_s, num_prefill_tokens=step.num_prefill_tokens)
        self._reader.read(step, result, now_s)

    def take_outputs(self) -> dict[int, StepOutputs]:
        """Return and forget all outputs: session -> outputs."""
        return self.book.outputs.take(max(0, self._next_step - 1))

    def check_integrity(self) -> None:
        """Recount pages, leases and requests.

        Raises:
            RuntimeError: If something is lost or counted twice.
        """
        self._pool.check_integrity()
        self._cache.check_integrity()
        self.prefix.check_integrity()
        check_requests(pool=self._pool, cache=self._cache, batch=self.batch, queue=self.queue, book=self.book)


def _make_queue(policy: SchedulingPolicy) -> WaitingQueue:
    return WaitingQueue(
        FairShares(max_running_per_key=policy.max_running_per_key),
        policy=policy.queue_policy,
        ttft_slo_s=policy.ttft_slo_s,
        promote_after_s=policy.promote_after_s,
    )


def _make_state(limits: EngineLimits) -> DecodeState:
    return DecodeState(
        max_num_seqs=limits.max_num_seqs, max_model_len=limits.max_model_len, block_tokens=limits.block_tokens
    )
