"""Sizes are declared once, and what decides is wired in one place: the engine, the simulator, benchmarks and tests share it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from loraplex_engine.__main__ import prepare_process
from loraplex_engine.config import EngineConfig
from support.base_models import write_base_model

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "services" / "engine" / "loraplex_engine"
WIRED = ("Scheduler", "AdapterCache", "ArenaGrants")
SIZES = ("max_num_seqs", "max_num_batched_tokens", "max_resident_adapters", "max_model_len", "num_arena_slots")
DECLARING = {
    "config.py:EngineConfig",  # the flags
    "limits.py:EngineLimits",
    "ranks/rank_line.py:RankSetup",  # what rank 0 tells the processes of the others
    "simulation/question.py:Question",  # what a simulation is asked, in JSON
    "rpc/validation.py:RequestLimits",  # of one request
}


def test_only_the_engine_s_state_wires_scheduler_cache_and_grants() -> None:
    files = [*(ROOT / "services").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    files.append(ROOT / "tests" / "support" / "scheduler_rig.py")
    made = {
        (path.name, node.func.id)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WIRED
    }

    assert made == {("engine_state.py", name) for name in WIRED}


def test_a_size_is_declared_by_the_flags_and_by_the_limits_and_nowhere_else() -> None:
    declared = {
        f"{path.relative_to(ENGINE)}:{node.name}"
        for path in ENGINE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id in SIZES
    }

    assert declared == DECLARING


def test_every_flag_of_the_engine_says_what_it_means() -> None:
    fields = EngineConfig.__dataclass_fields__.values()

    assert [field.name for field in fields if not field.metadata.get("help")] == []


def test_compute_threads_are_the_process_s_and_set_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # which it sets, too
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)

    prepare_process(EngineConfig(model=Path("base")))
    prepare_process(EngineConfig(model=Path("base"), num_threads=3))

    setters = {str(path.relative_to(ENGINE)) for path in ENGINE.rglob("*.py") if "set_num_threads(" in path.read_text()}
    assert (chosen, setters) == ([3], {"__main__.py", "ranks/__main__.py"})


def test_a_group_of_one_is_the_engine_without_a_group(tmp_path: Path) -> None:
    """In a process of its own: what other tests have imported says nothing."""
    model = write_base_model(tmp_path)
    script = f"""
import sys, torch
from pathlib import Path
from loraplex_engine import build
from loraplex_engine.config import EngineConfig
config = EngineConfig(
    model=Path({str(model)!r}), tensor_parallel=1, device="cpu", pool_bytes=2**22, arena_bytes=2**22
)
info, files = build.read_base_model(config)
device = torch.device("cpu")
runner = build.runner_factory(config, info, device, files=files)(build.engine_limits(config, info, device))
print(type(runner).__qualname__, runner._group, "loraplex_engine.ranks.runner" in sys.modules)
runner.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.stdout.split() == ["TorchRunner", "None", "False"], done.stderr
