"""The benchmark of tensor-parallel groups measures what there is, refuses what there is not, and its floors are held beside a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_bench.paths import ROOT
from loraplex_bench.ranks.floor import H100_RATES, RankFloor, checked_floors
from loraplex_engine.rank_split import PairSplit
from loraplex_engine.simulation.shapes import ALL_TARGETS, ModelShape, base_model

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = ROOT / "benchmarks" / "tensor_parallel.py"
MOST_OF_FLOOR = 1.55


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def test_a_tiny_model_is_measured_with_one_process_and_with_two(tmp_path: Path) -> None:
    done = run("--smoke", "--out", str(tmp_path), "--commit", "abc")

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    steps = {row["case"]: row for row in rows if row["metric"] == "step"}
    assert set(steps) == {f"tiny/{ranks}/{rows} rows" for ranks in ("1 rank", "2 ranks") for rows in (1, 4)}
    assert all(row["value"] > row["floor"] > 0 for row in steps.values())
    adapted = {row["case"] for row in rows if row["metric"] == "added"}
    waits = {row["case"]: row["value"] for row in rows if row["metric"] == "in collectives"}
    of_one, of_two = (
        {f"{case}/r{rank}" for case in steps if ranks in case for rank in (8, 64)} for ranks in ("1 rank/", "2 ranks/")
    )
    assert set(waits) == {f"{case}/{split.value}" for case in of_two for split in PairSplit}
    assert adapted == {f"{case}/whole" for case in of_one} | set(waits)
    assert all(value > 0 for value in waits.values())


def test_groups_of_gpus_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))

    assert done.returncode == 2
    assert done.stderr.startswith("not measured: --tensor-parallel 2 computes on CPUs only: the CUDA backend")
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_floors_of_large_models_are_said_to_be_floors(tmp_path: Path) -> None:
    done = run("--floors", "--out", str(tmp_path), "--commit", "abc")

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    file = json.loads(path.read_text())
    assert any("nothing below is measured" in note for note in file["meta"]["notes"])
    groups = [row for row in file["rows"] if "/rank" in row["case"] or " rank" in row["case"]]
    assert {row["case"].split("/")[0] for row in groups} == {"llama2-7b", "llama2-13b", "llama3-70b"}
    assert {row["metric"] for row in groups} == {"floor of step", "bound of out", "floor of added"}
    assert {case.rpartition("/")[2] for case in (row["case"] for row in groups)} >= {"whole", "divided"}


def test_steps_of_one_gpu_are_above_the_floor_of_a_group_of_one_and_near_it() -> None:
    found = list(checked_floors())

    assert len(found) >= 20
    assert all(1 < each.ratio < MOST_OF_FLOOR for each in found), [
        each for each in found if each.ratio >= MOST_OF_FLOOR
    ]


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-70b"])
@pytest.mark.parametrize("degree", [1, 2, 8])
def test_whole_factors_cost_the_bytes_that_the_simulator_counts(name: str, degree: int) -> None:
    shape = ModelShape(base_model(name), tp_degree=degree)

    added_s = RankFloor(shape, H100_RATES).lora_s(32, 16, PairSplit.WHOLE)

    weight_bytes = 32 * shape.adapter(16, ALL_TARGETS).weight_bytes
    assert added_s == pytest.approx(weight_bytes / H100_RATES.read_bytes_per_s, rel=1e-9)


def test_a_group_reads_its_share_of_the_weights_and_pays_for_collectives() -> None:
    one, four = (RankFloor(ModelShape(base_model("llama3-70b"), tp_degree=degree), H100_RATES) for degree in (1, 4))

    assert one.step_s(1, 320) / 4 < four.step_s(1, 320) < one.step_s(1, 320) / 2
