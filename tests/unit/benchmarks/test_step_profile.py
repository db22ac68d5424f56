"""A step's table adds up, and hand-made steps are steps that a backend computes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loraplex_bench.steps.kernel_table import DeviceEvent, markdown, read_trace, rows, summarise
from loraplex_bench.steps.plan import StepSize, make_plan
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from pathlib import Path


def event(name: str, begin_us: float, duration_us: float, stream: int = 7) -> DeviceEvent:
    return DeviceEvent(name=name, begin_us=begin_us, duration_us=duration_us, stream=stream)


def test_gaps_are_times_in_which_no_stream_runs_anything() -> None:
    profile = summarise(
        "step",
        [event("c", 30, 5), event("gemm", 10, 8), event("shrink", 11, 3, stream=9), event("gemm", 20, 6)],
    )

    lines = {line.name: (line.count, line.busy_us, line.gap_us) for line in profile.lines}
    assert lines == {"gemm": (2, 14, 2), "shrink": (1, 3, 0), "c": (1, 5, 4)}
    assert (profile.wall_us, profile.idle_us, profile.busy_us) == (25, 6, 22)
    assert profile.lines[0].name == "gemm"


def test_a_step_of_which_the_profiler_saw_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="saw nothing"):
        summarise("step", [])


def test_only_what_ran_on_the_device_is_read_from_a_trace(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 1.5, "dur": 2, "args": {"stream": 7}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 4, "dur": 1, "args": {"stream": 8}},
        {"ph": "M", "cat": "kernel", "name": "meta"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))

    assert read_trace(path) == [event("k", 1.5, 2), event("Memcpy HtoD", 4, 1, stream=8)]


def test_a_table_shows_the_longest_kernels_and_adds_up_the_rest() -> None:
    profile = summarise("step", [event(f"kernel{i}", 10 * i, i + 1) for i in range(6)])

    table = markdown(profile, max_lines=4)

    assert "| kernel5 | 1 | 6.0 |" in table
    assert "| 2 others | 2 | 3.0 |" in table
    assert "kernel0" not in table
    found = {(row.case, row.metric): row.value for row in rows(profile)}
    assert found["step", "wall"] == profile.wall_us
    assert found["step/kernel5", "gap"] == 5.0


@pytest.mark.parametrize(
    "size",
    [
        StepSize(num_decode=5, context=37),
        StepSize(num_decode=3, context=20, num_prompts=2, prompt_tokens=19),
        StepSize(num_decode=0, num_prompts=3, prompt_tokens=40),
    ],
)
def test_hand_made_steps_are_computed(tmp_path: Path, size: StepSize) -> None:
    info = load_base_model(write_base_model(tmp_path / "tiny", TinyBase()))
    pool = choose_pool_geometry(info, dtype="float32")
    limits = EngineLimits(pool=pool, num_pages=size.num_pages(pool), max_num_seqs=size.num_rows, max_model_len=64)
    weights = WeightReader(tmp_path / "tiny", dtype=torch.float32, device=torch.device("cpu"))
    runner = TorchRunner(RunnerConfig(info=info, limits=limits), weights)
    plan = make_plan(size, pool, np.full(size.num_rows, NO_ADAPTER, dtype=np.int32), step_id=1)

    result = runner.launch(plan).wait()
    runner.close()

    assert len(result.token_ids) == size.num_rows
    used = plan.block_tables[plan.block_tables >= 0]
    assert sorted(used.tolist()) == list(range(size.num_pages(pool)))
