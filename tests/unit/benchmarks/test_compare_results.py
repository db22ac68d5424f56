"""Two runs are compared row by row, and a drift beyond the limit is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "compare_results.py"


def result_file(path: Path, values: dict[str, float], metric: str = "added") -> Path:
    rows = [{"suite": "layers", "case": case, "metric": metric, "value": value} for case, value in values.items()]
    path.write_text(json.dumps({"rows": rows}))
    return path


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_largest_difference_decides(tmp_path: Path) -> None:
    first = result_file(tmp_path / "a.json", {"x": 100.0, "y": 50.0, "only first": 1.0})
    second = result_file(tmp_path / "b.json", {"x": 101.0, "y": 51.5, "only second": 1.0})

    close, far = compare(first, second, "--limit", 0.04), compare(first, second, "--limit", 0.02)

    assert close.returncode == 0, close.stderr
    assert far.returncode == 1
    assert "2 rows, largest difference 3.00%, 1 beyond the limit" in far.stdout
    assert far.stdout.index("layers/y/added") < far.stdout.index("layers/x/added")


def test_files_without_a_common_row_are_an_error(tmp_path: Path) -> None:
    first = result_file(tmp_path / "a.json", {"x": 1.0})
    second = result_file(tmp_path / "b.json", {"x": 1.0}, metric="unfinished")

    done = compare(first, second)

    assert done.returncode == 1
    assert "share no row" in done.stderr
