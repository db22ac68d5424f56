"""Every kind of end-to-end case runs, on a tiny model without a GPU, so that no GPU time is spent on finding out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_bench.end_to_end.context import Bench
from loraplex_bench.end_to_end.smoke_cases import smoke_cases
from support.base_models import TinyBase, write_base_model

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "engine.py"
METRICS = {
    "bursts": {"out_tok_per_s", "share_of_base"},
    "registered": {"out_tok_per_s", "share_of_2"},
    "slora": {"slo_attainment_6s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "unfinished"},
    "lora-off": {"out_tok_per_s_off", "on_over_off"},
    "no-cliff": {"throughput_share", "ttft_p99_ratio"},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("bench") / "tiny", TinyBase())


@pytest.mark.parametrize("name", METRICS)
def test_a_case_measures_its_figures(model_dir: Path, name: str) -> None:
    bench = Bench()
    try:
        smoke_cases(model_dir)[name].run(bench)
    finally:
        bench.release()

    values = {row.metric: row.value for row in bench.results.rows}
    assert set(values) >= METRICS[name]
    assert all(value >= 0 for value in values.values())
    assert all(values[metric] > 0 for metric in METRICS[name] - {"unfinished"})


def test_the_command_writes_a_result_file_of_a_cold_and_a_warm_start(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "startup", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("engine-*.json")
    rows = json.loads(path.read_text())["rows"]
    first = {row["case"]: row["value"] for row in rows if row["metric"] == "first_token"}
    assert set(first) == {f"tiny/startup/{name} kernel cache" for name in ("cold", "warm")}
    assert all(0 < seconds < 60 for seconds in first.values())


def test_an_unknown_case_is_refused_with_the_list() -> None:
    command = [sys.executable, str(SCRIPT), "bursts-70b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 1
    assert "no such case: bursts-70b" in done.stderr
    assert "slora-7b" in done.stdout
