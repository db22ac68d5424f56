"""The benchmark of several adapters per row makes its plans and figures without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from loraplex_bench.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = ROOT / "benchmarks" / "several_adapters.py"


def test_three_adapters_per_row_are_compared_with_three_runs_and_with_as_many_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path), "--commit", "abc"]

    subprocess.run(command, check=True, capture_output=True, timeout=120)

    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    bars = {row["metric"]: row["floor"] for row in rows if "8 rows/3 of LoRA r16 each" in row["case"] and row["floor"]}
    assert bars == {"of the 3 runs' added": 1.05, "of 24 rows' added": 1.05}
    assert sum("r512" in row["case"] for row in rows) >= 4
