"""The benchmark of structured output runs, on a tiny model without a GPU, so that no GPU time is spent on finding out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from loraplex_bench.end_to_end.structured import PAIRS

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "structured.py"


def test_every_kind_of_row_is_measured_and_compared(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--repeats", "1", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("structured-*.json")
    values = {(row["case"].split("/")[-1], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    for first, second in PAIRS:
        assert values[first.name, "gap_p50"] >= 0  # 0 where the reader lags
        assert values[second.name, "gap_p50_of_plain"] > 0
        assert values[second.name, "share_of_plain"] > 0
        assert (values[first.name, "mask_per_step"] == 0) == (not any(first.is_structured))
        assert values[second.name, "mask_per_step"] > 0
        assert values[second.name, "extra_steps"] <= 3, "rows get a token of every step"
