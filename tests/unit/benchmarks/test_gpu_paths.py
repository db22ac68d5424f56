"""The parts of the benchmarks that only run on a GPU, on a CPU: the backend is swapped, nothing else."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_bench import rig as rig_module
from loraplex_bench.end_to_end.cases import setup_of
from loraplex_bench.end_to_end.replay import Replay
from loraplex_bench.rig import Rig, RigSetup
from loraplex_bench.shapes import AdapterFamily, Shape
from loraplex_bench.steps import step_bench
from loraplex_client.workload import burst
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "profile_step.py"
CPU = torch.device("cpu")


class Pinned:
    """Memory that is pinned once a caller has waited for it."""

    def __init__(self, arena: NDArray[np.uint8]) -> None:
        self.arena = arena
        self.num_waits = 0
        self.was_clear = not arena.any()

    def wait(self) -> None:
        self.num_waits += 1


class PinningRunner(TorchRunner):
    """Has what the CUDA backend has besides."""

    pinned: Pinned | None = None
    graphs: Any = ()

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> Pinned:
        self.pinned = Pinned(arena)
        return self.pinned


class Graphs(list[int]):
    """As many captured graphs as asked for."""

    capture_s = 0.5


@pytest.fixture
def shape(tmp_path: Path) -> Shape:
    info = load_base_model(write_base_model(tmp_path / "tiny", TinyBase()), name="tiny")
    return Shape(info=info, pool_gib=2**-9, dtype="bfloat16")


def make_runner(model_dir: Path, shape: Shape, num_pages: int, max_num_seqs: int) -> PinningRunner:
    limits = EngineLimits(pool=shape.pool, num_pages=num_pages, max_num_seqs=max_num_seqs, max_model_len=512)
    runner = PinningRunner(
        RunnerConfig(info=shape.info, limits=limits),
        WeightReader(model_dir, dtype=DTYPES[shape.dtype], device=CPU),
    )
    runner.graphs = Graphs([1, 2])
    return runner


def test_the_arena_is_pinned_before_it_is_filled_with_distinct_values(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners: list[PinningRunner] = []

    def make(setup: RigSetup, limits: EngineLimits, weights: object) -> PinningRunner:
        del weights
        runners.append(make_runner(tmp_path / "tiny", setup.shape, limits.num_pages, limits.max_num_seqs))
        return runners[-1]

    monkeypatch.setattr(rig_module, "DEVICE", CPU)
    monkeypatch.setattr(rig_module, "make_runner", make)
    setup = setup_of(shape, AdapterFamily(ranks=(4,)), 5, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    with Rig(setup, None) as rig:
        pinned = runners[0].pinned
        assert pinned is not None
        assert (pinned.num_waits, pinned.was_clear, rig.capture_s) == (1, True, 0.5)
        pages = setup.family.num_pages(shape, 0)
        images = rig.engine.arena.view[: 5 * pages].reshape(5, -1).copy()
        values = images.view(np.int16)
        assert len({image.tobytes() for image in images}) == 5
        assert (values != 0).mean() > 0.99

        measured = Replay(rig, burst(5, 10, prompt_tokens=6, output_tokens=3), workload=0).run()

        measured.require_complete()
        assert rig.num_resident == 5
        rig.evict_all()
        assert rig.num_resident == 0
        del pinned, images


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_step_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hand_made_steps_are_timed_over_loaded_adapters(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script()

    def make(config: Any, weights: object) -> PinningRunner:
        del weights
        return make_runner(tmp_path / "tiny", shape, config.limits.num_pages, config.limits.max_num_seqs)

    monkeypatch.setattr(step_bench, "DEVICE", CPU)
    monkeypatch.setattr(step_bench, "CudaRunner", make)
    monkeypatch.setattr(step_bench, "TIMED_STEPS", 3)
    wanted = {
        name: (replace(size, num_prompts=min(size.num_prompts, 2), prompt_tokens=32), count)
        for name, (size, count) in script.steps(3, 35).items()
    }
    bench = script.StepBench(shape, AdapterFamily(ranks=(4,)), 3, [size for size, _ in wanted.values()])

    times = [bench.step_ms(size, count) for size, count in wanted.values()]
    bench.runner.close()

    assert len(times) == 6
    assert all(total_ms > 0 and host_ms > 0 for total_ms, host_ms in times)
