"""Loads of planned steps: those of the steps that were measured, whichever kernels their decode rows take."""

from __future__ import annotations

import numpy as np
import pytest
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.measured import measured_step
from loraplex_engine.simulation.shapes import ModelShape, base_model
from loraplex_engine.simulation.step_loads import StepLoads
from loraplex_engine.step import NO_ADAPTER, StepPlan
from support.plans import Draw, sampling_arrays

SHAPE = ModelShape(base_model("llama2-7b"))


def make_plan(num_decode: int, context: int, prompts: int, tokens: int, num_adapters: int) -> StepPlan:
    """Return a step whose rows go round that many adapters, as the benchmarks' do."""
    rows = np.arange(num_decode + prompts, dtype=np.int32)
    return StepPlan(
        step_id=1,
        slots=rows,
        num_tokens=np.array([1] * num_decode + [tokens] * prompts, dtype=np.int32),
        starts=np.array([context] * num_decode + [0] * prompts, dtype=np.int32),
        token_ids=np.zeros(num_decode + prompts * tokens, dtype=np.int32),
        block_tables=np.zeros((len(rows), 1), dtype=np.int32),
        adapters=rows % num_adapters if num_adapters else np.full_like(rows, NO_ADAPTER),
        adapter_scales=np.ones(len(rows), dtype=np.float32),
        num_decode_rows=num_decode,
        sample_rows=rows,
        sampling=sampling_arrays([Draw()] * len(rows), [0] * len(rows)),
    )


def make_loads(num_adapters: int) -> StepLoads:
    """Return loads whose table holds adapters of rank 16 on q, k, v and o at their own indices."""
    loads = StepLoads(Adapters(SHAPE, num_adapters, (16,)), num_adapters)
    for adapter in range(num_adapters):
        loads.bind(adapter, adapter)
    return loads


@pytest.mark.parametrize(
    ("num_decode", "prompts", "num_adapters"),
    [(225, 31, 200), (225, 31, 0), (64, 2, 64), (63, 2, 63), (100, 2, 1), (0, 4, 4), (64, 0, 64), (8, 0, 1)],
)
def test_a_planned_step_is_the_load_of_the_measured_one(num_decode: int, prompts: int, num_adapters: int) -> None:
    kind = f"mixed, {num_decode} x 320 + {prompts} x 256" if prompts else f"decode, {num_decode} x 320"
    name = f"{kind}, {num_adapters or 'no'} adapter{'' if num_adapters == 1 else 's'}"

    load = make_loads(num_adapters or 1).of_plan(make_plan(num_decode, 320, prompts, 256, num_adapters))

    assert load == measured_step(f"llama2-7b/qkvo r16/{name}", 1.0).load


def test_prompts_without_an_adapter_launch_no_prefill_kernel() -> None:
    plan = make_plan(64, 320, 2, 256, 64)
    plan.adapters[64:] = NO_ADAPTER

    load = make_loads(64).of_plan(plan)

    assert (load.lora_ops, load.lora_prompt_ops, load.adapter_bytes) == (2, 0, 0)
    assert load.adapter_beside_bytes == 64 * SHAPE.adapter(16).weight_bytes
