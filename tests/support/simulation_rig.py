"""Small engines in virtual time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.base_model import BaseModelInfo
from loraplex_common.projections import gated_decoder_layer
from loraplex_engine.limits import EngineLimits
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.copies import Link
from loraplex_engine.simulation.fleet import Fleet
from loraplex_engine.simulation.setup import SimulationSetup
from loraplex_engine.simulation.shapes import ModelShape
from loraplex_engine.simulation.step_cost import StepCost, StepRates
from loraplex_engine.simulation.trace import NO_CONVERSATION, SavedTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.simulation.outcomes import Outcomes
    from loraplex_engine.simulation.trace import TraceArrays

TINY = ModelShape(
    BaseModelInfo(
        name="tiny",
        fingerprint="0" * 64,
        aliases=(),
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=256,
        max_position_embeddings=1024,
        config={},
        layers=(gated_decoder_layer(hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16),)
        * 2,
    ),
    num_block_tokens=4,
)
RATES = StepRates(
    layer_s=1e-3,
    weight_byte_s=1e-9,
    flop_s=1e-9,
    kv_byte_s=1e-7,
    pair_flop_s=1e-9,
    activation_byte_s=1e-9,
    row_s=1e-4,
    lora_op_s=1e-4,
    lora_prompt_op_s=1e-4,
    adapter_byte_s=1e-8,
    adapter_beside_byte_s=1e-8,
    lora_byte_s=1e-9,
    lora_row_byte_s=1e-9,
    lora_run_s=1e-9,
)


def make_trace(
    arrival_s: Sequence[float],
    *,
    adapter: Sequence[int] | int = -1,
    prompt_tokens: Sequence[int] | int = 8,
    output_tokens: Sequence[int] | int = 8,
    tenant: Sequence[int] | int = 0,
    conversation: Sequence[int] | int = NO_CONVERSATION,
) -> SavedTrace:
    """Return a trace; single values hold for all requests."""
    arrivals = np.asarray(arrival_s, dtype=np.float64)
    columns = {
        "adapter": adapter,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tenant": tenant,
        "conversation": conversation,
    }
    return SavedTrace(
        arrival_s=arrivals,
        **{name: np.broadcast_to(np.asarray(value, np.int32), arrivals.shape) for name, value in columns.items()},
    )


def make_setup(
    *,
    num_pages: int = 96,
    num_arena_slots: int = 256,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 128,
    shape: ModelShape = TINY,
    jumps: bool = True,
    fill_arena: bool = True,
) -> SimulationSetup:
    """Return an engine of few pages; every size can be replaced."""
    limits = EngineLimits(
        pool=shape.pool,
        num_pages=num_pages,
        num_arena_slots=num_arena_slots,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_resident_adapters=16,
    )
    return SimulationSetup(
        limits=limits,
        cost=StepCost(shape, RATES),
        copy=Link(bytes_per_s=1e6, latency_s=1e-4),
        store=Link(bytes_per_s=2e5, latency_s=1e-3),
        fill_arena=fill_arena,
        jumps=jumps,
    )


def replay(
    trace: TraceArrays,
    setup: SimulationSetup,
    *,
    num_adapters: int = 8,
    ranks: Sequence[int] = (4, 8),
    num_engines: int = 1,
    jumps: bool = True,
) -> tuple[Outcomes, Fleet]:
    """Replay a trace and check every account at the end."""
    adapters = Adapters(setup.cost.shape, num_adapters, ranks)
    fleet = Fleet(replace(setup, jumps=jumps), adapters, trace, num_engines=num_engines)
    outcomes = fleet.run()
    for engine in fleet.engines:
        engine.scheduler.check_integrity()
        assert engine.scheduler.num_open == 0
        assert math.isfinite(engine.now_s)
    return outcomes, fleet
