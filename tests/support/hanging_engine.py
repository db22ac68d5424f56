"""``python -m support.hanging_engine FILE ...``: the engine with a device that hangs as long as the file exists."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_engine.__main__ import main
from loraplex_engine.runners.torch.runner import TorchRunner

if TYPE_CHECKING:
    from loraplex_engine.runners.torch.handles import TorchStepHandle
    from loraplex_engine.step import StepPlan

LOOK_S: Final = 0.02


def hang_while_there_is(file: Path) -> None:
    """Make every step wait until the file is gone."""
    launch = TorchRunner.launch

    def hanging_launch(runner: TorchRunner, plan: StepPlan) -> TorchStepHandle:
        while file.exists():
            time.sleep(LOOK_S)
        return launch(runner, plan)

    TorchRunner.launch = hanging_launch  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    hang_while_there_is(Path(sys.argv[1]))
    main(sys.argv[2:])
