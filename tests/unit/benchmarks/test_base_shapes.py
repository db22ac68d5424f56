"""Shapes of other base models beside Llama-3-8B, and random FP8 weights of each kind of scale, in memory and in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loraplex_bench.base_shapes import BF16_SHAPES, FP8_SHAPES
from loraplex_bench.end_to_end.cases import ALL_LINEAR
from loraplex_bench.end_to_end.context import Bench
from loraplex_bench.end_to_end.smoke_cases import smoke_cases
from loraplex_bench.floors import dense_params, step_weight_bytes
from loraplex_bench.fp8_checkpoint import write_fp8_checkpoint
from loraplex_bench.random_weights import quantise_blocks
from loraplex_common.base_model import load_base_model
from loraplex_engine.model.fp8 import Fp8Weight
from support.base_models import TinyBase, write_base_model

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "engine.py"
CPU = torch.device("cpu")
SHAPES = {shape.name: shape for shape in (*BF16_SHAPES, *FP8_SHAPES)}


@pytest.mark.parametrize(
    ("name", "millions", "modules"),
    [
        ("gemma3-4b", 3208, 7),
        ("phi4", 13631, 4),
        ("qwen3-8b", 6945, 7),
    ],
)
def test_a_shape_has_the_parameters_of_its_model(name: str, millions: int, modules: int) -> None:
    shape = SHAPES[name]

    assert dense_params(shape) // 10**6 == millions
    assert len(ALL_LINEAR.spec(shape, 0).modules) == modules * shape.info.num_layers
    assert ALL_LINEAR.num_pages(shape, 0) > 0


def test_weights_in_fp8_count_a_byte_and_lm_head_two() -> None:
    shape = SHAPES["qwen3-8b"]

    assert step_weight_bytes(shape) == dense_params(shape) + 2 * 4096 * 151936


def test_scales_of_blocks_stand_for_the_weight() -> None:
    weight = torch.randn((200, 300), generator=torch.Generator().manual_seed(1))

    codes, scales = quantise_blocks(weight)
    read = Fp8Weight(codes, scales, is_blocked=True, dtype=torch.float32).rows(0, 200)

    assert scales.shape == (2, 3)
    assert (read - weight).abs().max() <= weight.abs().max() / 16


def test_shapes_are_compared_with_the_first(tmp_path: Path) -> None:
    bench = Bench()
    try:
        smoke_cases(write_base_model(tmp_path / "tiny", TinyBase()))["shapes"].run(bench)
    finally:
        bench.release()

    compared = [row for row in bench.results.rows if row.metric == "of_tiny"]
    steps = [row for row in bench.results.rows if row.metric == "step"]
    assert [row.case.split("/")[2].split(":")[0] for row in compared] == ["burst", "burst", "decode"]
    assert len(steps) == 2
    assert compared[-1].value == pytest.approx(
        steps[1].value / (steps[1].floor or 0) / steps[0].value * (steps[0].floor or 0)
    )


def test_a_checkpoint_of_a_seed_is_the_same_model_each_time(tmp_path: Path) -> None:
    tiny = load_base_model(write_base_model(tmp_path / "tiny", TinyBase()))

    written = [write_fp8_checkpoint(tmp_path / f"{index}", tiny, device=CPU, seed=index // 2) for index in range(3)]

    fingerprints = [load_base_model(folder).fingerprint for folder in written]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_start_reads_a_checkpoint_from_its_files(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "startup-files", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("engine-*.json")
    first = [row for row in json.loads(path.read_text())["rows"] if row["metric"] == "first_token"]
    assert [row["case"] for row in first] == [
        f"tiny, FP8 files/startup/{name} kernel cache" for name in ("cold", "warm")
    ]
    assert all(0 < row["value"] < 60 for row in first)


def test_a_shape_without_blocks_names_its_form() -> None:
    assert [shape.form for shape in FP8_SHAPES] == ["FP8", "FP8 blocks"]
    assert all(not shape.form for shape in BF16_SHAPES)
