"""The steps that the runner has and whose results have not been read: launches, draws under masks, results.

Plain steps are launched whole, before the result of the step before is known. A step with masked rows is launched
without its draw: while the device runs its forward pass, the host reads the result of the step before, has the rules take
in what it drew, and fills the masks. The next step is launched once the draw is, as its input comes from there.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from loraplex_engine.constraints.output_rules import fill_masks
from loraplex_engine.faults import internal_error
from loraplex_engine.loop.totals import LoopTotals
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from loraplex_engine.constraints.types import MaskFiller
    from loraplex_engine.loop.step_times import StepTimes
    from loraplex_engine.loop.step_watchdog import Pulse
    from loraplex_engine.model_runner import ModelRunner, StepHandle
    from loraplex_engine.scheduler.scheduler import Scheduler
    from loraplex_engine.step import StepPlan


class StepsInFlight:
    """Hands plans to the runner and results to the scheduler.

    Args:
        scheduler: Made the plans.
        runner: Computes them.
        times: Says how long steps should take.
        pulse: Told what the loop's thread does.
        filler: Fills the masks of structured outputs; None if there cannot be any.

    Attributes:
        totals: Where the loop has spent its time.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, *, times: StepTimes, pulse: Pulse, filler: MaskFiller | None
    ) -> None:
        self._scheduler, self._runner, self._filler = scheduler, runner, filler
        self._times, self._pulse = times, pulse
        self._steps: deque[StepHandle] = deque()
        self._awaits_masks = False  # the newest step does
        self.totals = LoopTotals()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether no further plan is worth launching before a result is read."""
        return len(self._steps) >= self._runner.pipeline_depth

    def launch(self, plan: StepPlan) -> None:
        """Hand a plan to the runner."""
        began_s = time.perf_counter()
        self._times.launched(plan)
        self._pulse.works(self._times.expected_s)
        self._steps.append(self._runner.launch(plan))
        self._awaits_masks = len(plan.masked) > 0
        totals = self.totals
        totals.launch_s += time.perf_counter() - began_s
        totals.add_step(len(plan.token_ids))
        totals.num_adapters += len({*plan.adapters.tolist(), *plan.more_adapters.adapters.tolist()} - {NO_ADAPTER})

    def complete(self) -> None:
        """Wait for the oldest step and pass its result on."""
        if len(self._steps) == 1:
            self.draw()
        step = self._steps.popleft()
        began_s = time.perf_counter()
        self._pulse.works(self._times.expected_s)
        result = step.wait()
        self._times.completed()
        self._pulse.works()
        waited_s = time.perf_counter()
        self._scheduler.update(result)
        self.totals.wait_s += waited_s - began_s
        self.totals.update_s += time.perf_counter() - waited_s

    def draw(self) -> None:
        """Have the newest step draw if it awaits masks; only once the results of all earlier steps have been read."""
        if not self._awaits_masks or len(self._steps) != 1:
            return
        began_s = time.perf_counter()
        self._pulse.works(self._times.expected_s)
        step = self._steps[0]
        try:
            fill_masks(self._scheduler.rules(), step.masks, self._filler)
        except Exception as error:  # no rule is known to be at fault, but no plain row is
            self._scheduler.fail_masked(internal_error("while the masks of structured outputs were filled", error))
        filled_s = time.perf_counter()
        step.draw()
        self._awaits_masks = False
        self.totals.mask_s += filled_s - began_s
        self.totals.launch_s += time.perf_counter() - filled_s
