"""What the scheduler costs the host, as ``benchmarks/scheduler_cost.py`` measures it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from loraplex_bench.paths import ROOT
from loraplex_bench.policies.figures import Figure

if TYPE_CHECKING:
    from loraplex_bench.policies.figures import Report

SECTION: Final = "cost"
MAX_STEP_US: Final = 300.0
MAX_ADAPTER_BYTES: Final = 2048.0
CASES: Final = "256 running, 2,000 waiting, 10,000 known adapters"
_CASE: Final = re.compile(r"(\w+), microseconds:")
_TOGETHER: Final = re.compile(r"\s+together\s+fastest decile\s+(\d+)\s+median\s+(\d+)\s+p99\s+(\d+)")
_MEMORY: Final = re.compile(r"host memory per known adapter: (\d+) bytes")


def parse(output: str) -> tuple[dict[str, tuple[float, float, float]], float]:
    """Return microseconds per step (fastest decile, median, p99) by case, and bytes per adapter.

    Raises:
        ValueError: If the script printed something else.
    """
    steps: dict[str, tuple[float, float, float]] = {}
    case = ""
    for line in output.splitlines():
        if named := _CASE.fullmatch(line):
            case = named[1]
        elif found := _TOGETHER.fullmatch(line):
            steps[case] = (float(found[1]), float(found[2]), float(found[3]))
    memory = _MEMORY.search(output)
    if not steps or memory is None:
        raise ValueError(f"scheduler_cost.py printed no figures: {output[-500:]!r}")
    return steps, float(memory[1])


def run(report: Report) -> None:
    """Run the script and bound what it measured; the fastest decile is the code's cost, the rest is the machine's too."""
    script = str(ROOT / "benchmarks" / "scheduler_cost.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: its own bound on the median does not hold
        raise RuntimeError(f"scheduler_cost.py failed: {done.stderr[-2000:]}")
    steps, adapter_bytes = parse(done.stdout)
    for case, (fastest, median, slowest) in steps.items():
        for name, value, bound in (("fastest decile", fastest, MAX_STEP_US), ("median", median, None)):
            report.add(
                Figure(
                    section=SECTION,
                    case=f"{CASES}, {case}, {name}",
                    metric="us",
                    value=value,
                    unit="us",
                    at_most=bound,
                )
            )
        report.note(f"{case}: p99 {slowest:.0f} us")
    report.add(
        Figure(
            section=SECTION,
            case="10,000 known adapters",
            metric="bytes each",
            value=adapter_bytes,
            unit="B",
            at_most=MAX_ADAPTER_BYTES,
        )
    )
