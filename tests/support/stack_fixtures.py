"""Stacks as pytest fixtures: `tiny_stack` with a random two-layer Llama, `smol_stack` with the demo's real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_client import Client
from support.adapters import Recipe, write_adapter
from support.backend import served_base
from support.base_models import TinyBase, write_base_model
from support.demo_model import find_demo_model
from support.stack import Stack, StackFlags, running_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO_DIR = Path(__file__).parents[2] / "examples" / "demo"
TINY_RECIPES = {
    "tiny-a": Recipe(rank=4, seed=1),
    "tiny-b": Recipe(rank=16, alpha=8, use_rslora=True, seed=2),
    "tiny-c": Recipe(rank=1, targets=("q_proj", "v_proj"), dtype="bfloat16", seed=3),
    "tiny-d": Recipe(rank=8, targets=("gate_proj", "down_proj"), layers=(1,), seed=4),
    "tiny-e": Recipe(rank=32, rank_pattern={"o_proj": 3}, dtype="float16", seed=5),
}


def write_tiny_world(directory: Path) -> tuple[Path, Path]:
    """Write a tiny base model and adapters of it; return the model's directory and the import root."""
    model = write_base_model(directory / "tiny", served_base(TinyBase(name_or_path="tiny/base")))
    for name, recipe in TINY_RECIPES.items():
        write_adapter(directory / "adapters" / name, model, recipe)
    return model, directory / "adapters"


def import_all(stack: Stack) -> dict[str, str]:
    """Import every adapter below the import root under its directory's name; return name -> revision."""
    found = sorted(path for path in stack.import_root.iterdir() if (path / "adapter_config.json").exists())
    with Client(stack.gateway.grpc, store_target=stack.store.grpc) as client:
        return {path.name: client.adapters.import_directory(path.name, path).revision.digest for path in found}


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base model and the directory of its adapters."""
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny_stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with room for everything; every test must leave it unchanged."""
    with running_stack(tmp_path_factory.mktemp("stack"), *tiny_world) as stack:
        yield stack


@pytest.fixture(scope="session")
def smol_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo's stack, in fp32."""
    flags = StackFlags(engine=("--pool-bytes", "512MiB", "--arena-bytes", "128MiB", "--max-num-batched-tokens", "512"))
    with running_stack(tmp_path_factory.mktemp("smol"), find_demo_model(), DEMO_DIR / "adapters", flags) as stack:
        yield stack


def golden_cases() -> list[dict[str, Any]]:
    """Return the cases of golden.json."""
    cases: list[dict[str, Any]] = json.loads((DEMO_DIR / "golden.json").read_text())["cases"]
    return cases
