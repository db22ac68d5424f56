"""One engine in virtual time.

The scheduler, page pool, adapter cache, arena and grants are the engine's own; the loop does what `EngineLoop` does in
a turn. Only the device (`StepCost`), the copy stream and the store are models. One step is in flight at a time, while
the real loop prepares a step ahead and learns of its result one step later; that costs a real request one step in some
hundred.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.loop.engine_state import EngineState
from loraplex_engine.messages import (
    ResidencyState,
    StoreEvent,
    WantImage,
)
from loraplex_engine.simulation.copies import (
    CopyStream,
    SimulatedStore,
)
from loraplex_engine.simulation.outcomes import Outcomes
from loraplex_engine.simulation.requests import SESSION, TraceRequests
from loraplex_engine.simulation.steady_decode import SteadyDecode
from loraplex_engine.simulation.step_cost import Stretch
from loraplex_engine.simulation.step_loads import StepLoads
from loraplex_engine.step import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.simulation.adapters import Adapters
    from loraplex_engine.simulation.setup import SimulationSetup
    from loraplex_engine.simulation.trace import TraceArrays
    from loraplex_engine.step import StepPlan

_WARM: Final = (ResidencyState.RESIDENT, ResidencyState.LOADING, ResidencyState.WANTED)


class StalledError(RuntimeError):
    """Requests are open but nothing can happen any more: a defect of the scheduler or of its limits."""


class SimulatedEngine:
    """Replays a trace.

    Args:
        setup: Sizes and rates.
        adapters: All adapters that the trace may name.
        trace: Requests.
        watch: Called after each step or jump with this engine, for figures that outcomes do not hold.

    Attributes:
        now_s: Virtual time.
        outcomes: What became of the requests.
        num_turns: Passes of the loop, which are the cost of a replay.
        device_s: Time in which a step ran.
        longest_step_s: Longest step.
    """

    def __init__(
        self,
        setup: SimulationSetup,
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
        self._requests = TraceRequests(trace, adapters, self.outcomes, max_model_len=setup.limits.max_model_len)
        if setup.fill_arena:
            self._fill_arena()

    def _build(self) -> None:
        setup, limits = self.setup, self.setup.limits
        self.arena = HostArena(limits.num_arena_slots, 1)  # accounts only: no image is ever written
        state = EngineState(
            limits,
            self.arena,
            emit=self._on_store_event,
            clock=self.clock,
            page_worth=setup.page_worth,
            page_sources=setup.page_sources,
        )
        self.pool, self.cache, self.scheduler, self.grants = state.pool, state.cache, state.scheduler, state.grants
        self._steady = SteadyDecode(self.scheduler, pool=self.pool, cache=self.cache, clock=self.clock)
        self._page_bytes = limits.page_bytes
        self.copies = CopyStream(setup.copy)
        self.store = SimulatedStore(
            adapters=self._adapters, grants=self.grants, link=setup.store, page_bytes=limits.page_bytes
        )
        self._loads = StepLoads(self._adapters, limits.max_resident_adapters)

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
        """Requests that have arrived and have not ended."""
        return self.scheduler.num_open + len(self._inbox)

    def holds(self, adapter: int) -> bool:
        """Tell whether an adapter is on the device, or was asked for and is on its way."""
        return self.cache.state_of(self._adapters.digests[adapter]) in _WARM

    def push(self, index: int) -> None:
        """Hand over a request at its arrival, once `advance` has come that far."""
        self._settle(float(self.trace.arrival_s[index]))
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
        rows = self.scheduler.decide()
        self._move_adapters()
        self._take_ends()
        stretch = self._look_ahead()
        if stretch is None:
            plan = self.scheduler.plan(rows)
            if plan is None:
                return self._sleep(until_s)
            self._step(plan)
            stretch = self._look_ahead()
        has_more = self._jump(stretch, until_s)
        if self._watch is not None:
            self._watch(self)
        return has_more

    def _step(self, plan: StepPlan) -> None:
        """Take one step as planned."""
        step_s = self.setup.cost.seconds(self._loads.of_plan(plan))
        self.longest_step_s = max(self.longest_step_s, step_s)
        self._pass(step_s)
        self.scheduler.update(self._result_of(plan))
        self._take_ends()

    def _pass(self, span_s: float) -> None:
        self.now_s += span_s
        self.device_s += span_s

    def _take_events(self) -> None:
        """Hand over what has happened by now: arrivals, loads, images."""
        for index in self._inbox:
            self.scheduler.submit(self._requests.submission(index, self.cache))
        self._inbox.clear()
        for digest in self.copies.take_done(self.now_s):
            self.cache.load_finished(digest)
        for index, slots in self.store.take_arrived(self.now_s):
            self.scheduler.image_arrived(self._adapters.spec(index), slots)

    def _move_adapters(self) -> None:
        """Start the transfers and loads that the scheduler asked for."""
        for index in self._wants:
            self.store.want(index)
        self._wants.clear()
        self.grants.serve()
        self.store.begin_granted(self.now_s)
        self.cache.loads.take_unloads()
        for load in self.cache.loads.take_loads():
            self._loads.bind(load.index, self._adapters.index_of(load.digest))
            self.copies.start(load.digest, len(load.pages) * self._page_bytes, self.now_s)

    @property
    def _next_event_s(self) -> float:
        return min(self.copies.next_s, self.store.next_s, self.scheduler.next_deadline_s)

    def _sleep(self, until_s: float) -> bool:
        """Advance to the next event, or to ``until_s`` if that comes first."""
        event_s = min(until_s, self._next_event_s)
        if math.isinf(event_s):
            if self.scheduler.num_open:
                raise StalledError(f"{self.scheduler.num_open} requests are open at {self.now_s:.3f} s, nothing moves")
            return False
        self.now_s = max(self.now_s, event_s)
        return self.now_s < until_s

    # --- steady stretches ---

    def _jump(self, stretch: Stretch | None, until_s: float) -> bool:
        """Take steady decode steps until something else happens; False if that is not before ``until_s``."""
        while stretch is not None:
            last_begins_s = self.now_s + stretch.last_begins_s
            if last_begins_s >= until_s:
                self._stretch, self._quiet_until_s = stretch, last_begins_s
                return False
            self._take(stretch)
            stretch = self._look_ahead()
        return True

    def _look_ahead(self) -> Stretch | None:
        """Return the decode steps up to the next event of this engine itself; None if that event is now."""
        span_s = self._next_event_s - self.now_s
        if not self.setup.jumps or self._inbox or span_s <= 0:
            return None
        most = self._steady.horizon
        if most <= 0:
            return None
        load = self._loads.of_decode(self.scheduler.batch)
        cost = self.setup.cost
        return Stretch(cost.seconds(load), cost.growth_s(load), most).cut(span_s)

    def _take(self, stretch: Stretch) -> None:
        self.longest_step_s = max(self.longest_step_s, stretch.longest_s)
        self._pass(stretch.total_s)
        self._steady.skip(stretch.num_steps, self._draw, growth_s=stretch.growth_s)
        self._take_ends()

    def _settle(self, at_s: float) -> None:
        """Take the steps of a stretch left for later that begin before ``at_s``."""
        stretch, self._stretch, self._quiet_until_s = self._stretch, None, -math.inf
        if stretch is not None and at_s > self.now_s:
            self._take(stretch.cut(at_s - self.now_s))

    def _finish_stretch(self) -> None:
        """Take all steps that were left for later: the virtual time has come to its end."""
        stretch, self._stretch, self._quiet_until_s = self._stretch, None, -math.inf
        if stretch is not None:
            self._take(stretch)

    def _take_ends(self) -> None:
        outputs = self.scheduler.take_outputs().get(SESSION)
        if outputs is not None:
            self._requests.take(outputs.events, self.now_s)

    # --- the device ---

    def _result_of(self, plan: StepPlan) -> StepResult:
        slots = plan.slots[plan.sample_rows]
        state = self.scheduler.batch.state
        rows = slots.astype(np.intp)
        first = state.num_prompt_tokens.take(rows) + plan.sampling.position
        return StepResult(step_id=plan.step_id, slots=slots, token_ids=self._draw(rows, first, 1)[:, 0])

    def _draw(self, rows: Rows, first: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        return self._requests.tokens(self.scheduler.batch.state.session_slots.take(rows), first, count)
