"""The layers suite launches the engine's own kernels and reports what LoRA adds beside floor and peer."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from loraplex_bench.peers import best_added
from loraplex_bench.popularity import baseline_adapters
from loraplex_bench.random_weights import RandomWeights
from loraplex_bench.results import Results
from loraplex_bench.shapes import AdapterFamily, Shape
from loraplex_bench.steps.layer_cases import OP_CASES, STACK_CASES, OpCase, base_of, measure_ops, measure_stack
from loraplex_bench.steps.stack import DecodeStack, StackAdapters
from loraplex_common.base_model import load_base_model
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
BASE = TinyBase(hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=2)


@pytest.mark.parametrize(("batch", "used"), [(8, 4), (32, 15), (64, 28), (128, 51), (256, 91)])
def test_zipf_draws_are_the_baselines(batch: int, used: int) -> None:
    assert len(np.unique(baseline_adapters(batch, "zipf"))) == used
    assert sorted(baseline_adapters(batch, "distinct").tolist()) == list(range(batch))


def test_every_stack_case_has_a_floor_and_a_peer() -> None:
    for batch, popularity in STACK_CASES:
        floor, peer = best_added(
            "decode_stack", {"model_or_shape": "llama2-7b", "M": str(batch), "popularity": popularity}
        )

        assert floor is not None
        assert peer.value is not None
        assert peer.value > floor
    assert base_of(64)[1].value == 5321.47
    assert {case.rank for case in OP_CASES} == {16, 64}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
def test_steps_and_ops_run_with_lora_and_without(tmp_path: Path) -> None:
    info = load_base_model(write_base_model(tmp_path / "base", BASE), name="tiny")
    shape = Shape(info=info, pool_gib=0.0, dtype="float32")
    library = HostLibrary(torch.float32, tmp_path)
    stack = DecodeStack(shape, library, RandomWeights(dtype=torch.float32, device=CPU), max_rows=4)
    adapters = StackAdapters(stack, AdapterFamily(targets="all", ranks=(4,)), 4, num_sms=2)
    library.track(
        stack.kv_pool,
        adapters.pool,
        adapters.tables.tiles,
        adapters.tables.entries,
        *adapters.lora.fixed_tensors,
    )
    results, logits = Results(), list[torch.Tensor]()
    clock = itertools.count(1)

    def timer(run: Callable[[], None]) -> float:
        torch.manual_seed(0)
        stack.fill()
        run()
        logits.append(stack.decoder.work.logits[:4].clone())
        return float(next(clock)) * 10

    measure_stack(results, stack, adapters, timer, cases=((4, "distinct"),))
    cases = (OpCase(op="qkv", batch=4, rank=16), OpCase(op="o", batch=4, rank=16))
    measure_ops(results, stack, {16: adapters}, timer, cases=cases)

    found = {(row.case, row.metric): row.value for row in results.rows}
    prefix = "decode_stack/tiny/4"
    assert found[f"{prefix}/base", "with_pointwise"] == 20
    assert found[f"{prefix}/all r4/distinct/4", "added"] == 10
    assert found["in_place/qkv/4/r16/distinct/4", "added"] == 5  # two layers
    assert found["in_place/o/4/r16/distinct/4", "added"] == 5
    without, with_lora = logits[1], logits[2]
    assert not torch.allclose(without, with_lora)
