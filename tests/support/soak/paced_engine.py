"""``python -m support.soak.paced_engine FILE STEP_S ...``: an engine with slow steps; it hangs while FILE exists.

A tiny model's step takes a millisecond: no stream would last long enough to see a fault. Sleeping costs no CPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_engine.__main__ import main
from loraplex_engine.runners.torch.runner import TorchRunner
from support.hanging_engine import hang_while_there_is

if TYPE_CHECKING:
    from loraplex_engine.runners.torch.handles import TorchStepHandle
    from loraplex_engine.step import StepPlan


def pace(step_s: float) -> None:
    """Make every step take at least that long."""
    launch = TorchRunner.launch

    def paced_launch(runner: TorchRunner, plan: StepPlan) -> TorchStepHandle:
        time.sleep(step_s)
        return launch(runner, plan)

    TorchRunner.launch = paced_launch  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    pace(float(sys.argv[2]))
    hang_while_there_is(Path(sys.argv[1]))
    main(sys.argv[3:])
