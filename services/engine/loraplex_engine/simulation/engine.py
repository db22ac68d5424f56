"""One engine in virtual time.

The scheduler, page pool, adapter cache, arena and grants are the engine's own; the loop does what `EngineLoop` does in
a turn. Only the device (`StepCost`), the copy stream and the store are models. One step is in flight at a time: what
the real loop prepares a step ahead, it learns one step later, which costs a request one step of some hundred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.adapter_cache import AdapterCache
from loraplex_engine.appraisal import appraisal_of
from loraplex_engine.arena import HostArena
from loraplex_engine.arena_grants import ArenaGrants
from loraplex_engine.limits import SchedulerLimits, SchedulingPolicy
from loraplex_engine.messages import (
    Ended,
    FinishReason,
    ResidencyState,
    SamplingParams,
    StoppingParams,
    StoreEvent,
    Submission,
    WantImage,
)
from loraplex_engine.page_pool import PagePool
from loraplex_engine.scheduler import Scheduler
from loraplex_engine.simulation.copies import (
    PINNED_COPY,
    SHARED_MEMORY_STORE,
    CopyStream,
    Link,
    SimulatedStore,
)
from loraplex_engine.simulation.outcomes import End, Found, Outcomes
from loraplex_engine.simulation.step_cost import StepCost, StepLoad, Stretch
from loraplex_engine.simulation.trace import NO_ADAPTER, TokenStreams
from loraplex_engine.step import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from loraplex_engine.decode_state import Rows
    from loraplex_engine.simulation.adapters import Adapters
    from loraplex_engine.simulation.trace import TraceArrays
    from loraplex_engine.step import StepPlan

SESSION: Final = 1
DEFAULT_POLICY: Final = SchedulingPolicy()
_GREEDY: Final = SamplingParams(temperature=0.0)
_NO_TOKENS: Final = np.empty(0, dtype=np.int32)
_FOUND: Final = {
    ResidencyState.RESIDENT: Found.RESIDENT,
    ResidencyState.LOADING: Found.COMING,
    ResidencyState.WANTED: Found.COMING,
    ResidencyState.DRAINING: Found.COMING,
    ResidencyState.IN_ARENA: Found.IN_ARENA,
    ResidencyState.ABSENT: Found.MISSING,
}


_WARM: Final = (ResidencyState.RESIDENT, ResidencyState.LOADING, ResidencyState.WANTED)


class StalledError(RuntimeError):
    """Requests are open and nothing can ever happen again: a defect of the scheduler or of its limits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """An engine to simulate; sizes as in `EngineParams`.

    Attributes:
        cost: Seconds of a step.
        copy: From the arena to the pool.
        store: From the adapter store to the arena.
        fill_arena: Begin with as many images in the arena as it holds, lowest index first.
        jumps: Take steady decode steps at once; the outcome is the same, sooner.
    """

    cost: StepCost
    pool_bytes: int
    arena_bytes: int
    copy: Link = PINNED_COPY
    store: Link = SHARED_MEMORY_STORE
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_pass_over_s: float = 2.0
    max_resident_adapters: int = 4096
    policy: SchedulingPolicy = DEFAULT_POLICY
    fill_arena: bool = True
    jumps: bool = True

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.pool_bytes // self.cost.shape.pool.page_bytes

    @property
    def num_arena_slots(self) -> int:
        """Slots of the arena."""
        return self.arena_bytes // self.cost.shape.pool.page_bytes

    @property
    def limits(self) -> SchedulerLimits:
        """The scheduler's share."""
        return SchedulerLimits(
            block_tokens=self.cost.shape.pool.block_tokens,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_pass_over_s=self.max_pass_over_s,
            eos_token_ids=(),
            policy=self.policy,
        )


class SimulatedEngine:
    """Replays a trace.

    Args:
        setup: Sizes and rates.
        adapters: All that the trace may name.
        trace: Requests.
        watch: Called after each step or jump with this engine, for figures that outcomes do not hold.

    Attributes:
        now_s: Virtual time.
        outcomes: What became of the requests.
        num_turns: Passes of the loop: what a replay costs.
        device_s: Time in which a step ran.
        longest_step_s: Longest planned step; those of a jump are shorter than the one that ends it, or hardly longer.
    """

    def __init__(
        self,
        setup: EngineSetup,
        adapters: Adapters,
        trace: TraceArrays,
        *,
        watch: Callable[[SimulatedEngine], None] | None = None,
    ) -> None:
        self.setup = setup
        self.trace = trace
        self.now_s = 0.0
        self.num_turns = 0
        self.device_s = 0.0
        self.longest_step_s = 0.0
        self.outcomes = Outcomes(len(trace.arrival_s))
        self._adapters = adapters
        self._watch = watch
        self._wants: list[int] = []
        self._inbox: list[int] = []
        self._stretch: Stretch | None = None
        self._quiet_until_s = -math.inf
        self._build()
        self._streams = TokenStreams(trace, setup.max_model_len)
        self._arrivals: list[float] = trace.arrival_s.tolist()
        if setup.fill_arena:
            self._fill_arena()

    def _build(self) -> None:
        setup = self.setup
        page_bytes = setup.cost.shape.pool.page_bytes
        self.pool = PagePool(setup.num_pages)
        self.arena = HostArena(setup.num_arena_slots, 1)  # accounts only: nobody writes an image
        self.cache = AdapterCache(
            pool=self.pool,
            arena=self.arena,
            max_resident=setup.max_resident_adapters,
            emit=self._on_store_event,
            clock=self.clock,
            half_life_s=setup.policy.half_life_s,
            appraisal=appraisal_of(setup.policy.eviction),
        )
        self.scheduler = Scheduler(
            limits=setup.limits, pool=self.pool, cache=self.cache, page_bytes=page_bytes, clock=self.clock
        )
        grants = ArenaGrants(cache=self.cache, arena=self.arena, queue=self.scheduler.queue)
        self.grants = grants
        self.copies = CopyStream(setup.copy)
        self.store = SimulatedStore(adapters=self._adapters, grants=grants, link=setup.store, page_bytes=page_bytes)
        self._page_bytes = page_bytes
        self._bound = np.zeros(setup.max_resident_adapters, dtype=np.intp)  # table index -> adapter

    def clock(self) -> float:
        """Return the virtual time."""
        return self.now_s

    def close(self) -> None:
        """Free the arena's file."""
        self.arena.close()

    def _fill_arena(self) -> None:
        for index in range(len(self._adapters)):
            slots = self.arena.allocate(int(self._adapters.num_pages[index]))
            if slots is None:
                return
            self.scheduler.image_arrived(self._adapters.spec(index), slots)

    def _on_store_event(self, event: StoreEvent) -> None:
        if isinstance(event, WantImage):
            self._wants.append(self._adapters.index_of(event.digest))

    # --- the loop ---

    @property
    def load(self) -> int:
        """Requests that are here and have not ended."""
        return self.scheduler.num_open + len(self._inbox)

    def holds(self, adapter: int) -> bool:
        """Tell whether an adapter is on the device, or was asked for and is on its way."""
        return self.cache.state_of(self._adapters.digests[adapter]) in _WARM

    def push(self, index: int) -> None:
        """Hand over a request at its arrival, once `advance` has come that far."""
        self._settle(self._arrivals[index])
        self._inbox.append(index)

    def advance(self, until_s: float) -> None:
        """Do every step that begins before ``until_s``; a steady stretch that reaches beyond it may be left for later.

        Raises:
            StalledError: If ``until_s`` is infinite and a request can never end.
        """
        if until_s <= self._quiet_until_s:
            return
        self._finish_stretch()
        while self.now_s < until_s and self._turn(until_s):
            pass

    def _turn(self, until_s: float) -> bool:
        """Do what the step loop does in one turn; False if nothing more happens before ``until_s``."""
        self.num_turns += 1
        self._take_events()
        plan = self.scheduler.schedule()
        self._move_adapters()
        if plan is None:
            self._take_ends()
            return self._sleep(until_s)
        step_s = self.setup.cost.seconds(self._load_of(plan))
        self.longest_step_s = max(self.longest_step_s, step_s)
        self._pass(step_s)
        self.scheduler.update(self._result_of(plan))
        self._take_ends()
        has_more = not self.setup.jumps or self._jump(until_s)
        if self._watch is not None:
            self._watch(self)
        return has_more

    def _pass(self, span_s: float) -> None:
        self.now_s += span_s
        self.device_s += span_s

    def _take_events(self) -> None:
        """Hand over what has happened by now: arrivals, loads, images."""
        for index in self._inbox:
            self._submit(index)
        self._inbox.clear()
        for digest in self.copies.take_done(self.now_s):
            self.cache.load_finished(digest)
        for index, slots in self.store.take_arrived(self.now_s):
            self.scheduler.image_arrived(self._adapters.spec(index), slots)

    def _move_adapters(self) -> None:
        """Start what the scheduler asked for: transfers and loads."""
        for index in self._wants:
            self.store.want(index)
        self._wants.clear()
        self.grants.serve()
        self.store.begin_granted(self.now_s)
        self.cache.take_unloads()
        for load in self.cache.take_loads():
            self._bound[load.index] = self._adapters.index_of(load.digest)
            self.copies.start(load.digest, len(load.pages) * self._page_bytes, self.now_s)

    @property
    def _next_event_s(self) -> float:
        return min(self.copies.next_s, self.store.next_s, self.scheduler.next_deadline_s)

    def _sleep(self, until_s: float) -> bool:
        """Go to the next event, or to ``until_s`` if that comes first."""
        event_s = min(until_s, self._next_event_s)
        if math.isinf(event_s):
            if self.scheduler.num_open:
                raise StalledError(f"{self.scheduler.num_open} requests are open at {self.now_s:.3f} s, nothing moves")
            return False
        self.now_s = max(self.now_s, event_s)
        return self.now_s < until_s

    # --- steady stretches ---

    def _jump(self, until_s: float) -> bool:
        """Take steady decode steps until something else happens; False if that is not before ``until_s``."""
        while (stretch := self._look_ahead()) is not None:
            last_begins_s = self.now_s + stretch.last_begins_s
            if last_begins_s >= until_s:
                self._stretch, self._quiet_until_s = stretch, last_begins_s
                return False
            self._take(stretch)
        return True

    def _look_ahead(self) -> Stretch | None:
        """Return the decode steps up to the next thing that happens to this engine by itself."""
        most = self.scheduler.horizon
        span_s = self._next_event_s - self.now_s
        if most <= 0 or span_s <= 0 or self._inbox:
            return None
        load = self._decode_load()
        cost = self.setup.cost
        return Stretch(cost.seconds(load), cost.growth_s(load), most).cut(span_s)

    def _take(self, stretch: Stretch) -> None:
        self._pass(stretch.total_s)
        self.scheduler.skip(stretch.num_steps, self._draw, growth_s=stretch.growth_s)
        self._take_ends()

    def _settle(self, at_s: float) -> None:
        """Take those steps of a stretch left for later that begin before ``at_s``."""
        stretch, self._stretch, self._quiet_until_s = self._stretch, None, -math.inf
        if stretch is not None and at_s > self.now_s:
            self._take(stretch.cut(at_s - self.now_s))

    def _finish_stretch(self) -> None:
        """Take what was left for later in full: time has come to its end."""
        stretch, self._stretch, self._quiet_until_s = self._stretch, None, -math.inf
        if stretch is not None:
            self._take(stretch)

    # --- requests ---

    def _submit(self, index: int) -> None:
        trace = self.trace
        adapter = int(trace.adapter[index])
        digest = None
        if adapter != NO_ADAPTER:
            digest = self._adapters.digests[adapter]
            self.outcomes.found[index] = _FOUND[self.cache.state_of(digest)]
        arrived_s = self._arrivals[index]
        self.scheduler.submit(
            Submission(
                session_id=SESSION,
                session_slot=index,
                request_id=str(index),
                prompt_token_ids=self._streams.prompt(index),
                resumed_token_ids=_NO_TOKENS,
                sampling=_GREEDY,
                stopping=StoppingParams(max_new_tokens=int(trace.output_tokens[index]), ignore_eos=True),
                adapter_digest=digest,
                fairness_key=f"tenant-{trace.tenant[index]}",
                arrived_s=arrived_s,
            )
        )

    def _take_ends(self) -> None:
        outputs = self.scheduler.take_outputs().get(SESSION)
        if outputs is None:
            return
        for event in outputs.events:
            if isinstance(event, Ended):
                self._end(event)

    def _end(self, event: Ended) -> None:
        index, outcomes = event.session_slot, self.outcomes
        outcomes.end_s[index] = self.now_s
        outcomes.load_s[index] = event.adapter_load_s
        if event.finish_reason is FinishReason.LENGTH:
            outcomes.end[index] = End.DONE
            outcomes.first_token_s[index] = self._arrivals[index] + event.queue_s + event.prefill_s
            return
        # An error after the first token leaves it delivered; decode_s counts from there.
        outcomes.end[index] = End.ABORTED if event.queue_s > 0 else End.REFUSED
        if event.decode_s > 0:
            outcomes.first_token_s[index] = self.now_s - event.decode_s

    # --- the device ---

    def _result_of(self, plan: StepPlan) -> StepResult:
        slots = plan.slots[plan.sample_rows]
        state = self.scheduler.batch.state
        rows = slots.astype(np.intp)
        first = state.num_prompt_tokens.take(rows) + plan.sampling.position
        return StepResult(step_id=plan.step_id, slots=slots, token_ids=self._draw(rows, first, 1)[:, 0])

    def _draw(self, rows: Rows, first: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        requests = self.scheduler.batch.state.session_slots.take(rows)
        return self._streams.tokens(requests.astype(np.intp), first, count)

    def _load_of(self, plan: StepPlan) -> StepLoad:
        decoding = plan.num_decode_rows
        tokens, starts = plan.num_tokens[decoding:].astype(np.int64), plan.starts[decoding:].astype(np.int64)
        adapter_bytes, lora_bytes = self._lora_load(plan.adapters, plan.num_tokens)
        return StepLoad(
            num_tokens=decoding + int(tokens.sum()),
            num_sampled=len(plan.sample_rows),
            kv_tokens=int(plan.starts[:decoding].sum()) + decoding,
            attention_pairs=int((tokens * starts + tokens * (tokens + 1) // 2).sum()),
            adapter_bytes=adapter_bytes,
            lora_bytes=lora_bytes,
            lora_ops=self._adapters.num_ops,
            num_decode_rows=decoding,
        )

    def _decode_load(self) -> StepLoad:
        """Return the load of the next step of a steady batch."""
        batch = self.scheduler.batch
        state, rows = batch.state, batch.rows
        adapter_bytes, lora_bytes = self._lora_load(state.adapters.take(rows), None)
        return StepLoad(
            num_tokens=len(rows),
            num_sampled=len(rows),
            kv_tokens=int(state.num_computed.take(rows).sum()) + len(rows),
            attention_pairs=0,
            adapter_bytes=adapter_bytes,
            lora_bytes=lora_bytes,
            lora_ops=self._adapters.num_ops,
            num_decode_rows=len(rows),
        )

    def _lora_load(self, table: NDArray[np.int32], num_tokens: NDArray[np.int32] | None) -> tuple[int, int]:
        """Return the bytes of the distinct adapters of some rows and of LoRA's activations."""
        adapted = table >= 0
        if not adapted.any():
            return 0, 0
        owners = self._bound.take(table[adapted])
        distinct = list(set(owners.tolist()))
        traffic = self._adapters.traffic_bytes.take(owners)
        if num_tokens is not None:
            traffic = traffic * num_tokens[adapted]
        return int(self._adapters.weight_bytes[distinct].sum()), int(traffic.sum())
