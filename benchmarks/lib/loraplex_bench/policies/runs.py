"""Replays for ``benchmarks/policies.py``: engines, and one call that replays a trace and sums it up."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.devices import DEVICES, GIB, H100
from loraplex_engine.simulation.engine import SimulatedEngine
from loraplex_engine.simulation.fleet import Fleet
from loraplex_engine.simulation.outcomes import Outcomes, Summary, summarize
from loraplex_engine.simulation.setup import SimulationSetup, gpu_limits
from loraplex_engine.simulation.shapes import ModelShape, base_model
from loraplex_engine.simulation.step_cost import StepCost, StepRates

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.simulation.trace import TraceArrays

LLAMA_13B: Final = ModelShape(base_model("llama2-13b"))
LLAMA_8B: Final = ModelShape(base_model("llama3-8b"))
MAX_MODEL_LEN: Final = 2048
SLORA_POOL_TOKENS: Final = 65_000
SLORA_SLOWDOWN: Final = 1.75
"""How much longer each term of a step takes on S-LoRA's A100 than the data sheet's share of our H100 figures.

The one number that is fitted to S-LoRA's table: with it, first-come-first-served finishes 4.06 requests per second at
R = 6 as there; all else of that table is predicted.
"""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A finished replay."""

    summary: Summary
    outcomes: Outcomes
    engine: SimulatedEngine


def replay(
    setup: SimulationSetup,
    adapters: Adapters,
    trace: TraceArrays,
    *,
    slo_ttft_s: float = 6.0,
    watch: Callable[[SimulatedEngine], None] | None = None,
) -> Replayed:
    """Replay a trace on one engine, check its accounts and sum up."""
    fleet = Fleet(setup, adapters, trace, watch=watch)
    outcomes = fleet.run()
    fleet.engines[0].scheduler.check_integrity()
    return Replayed(summarize(trace, outcomes, slo_ttft_s=slo_ttft_s), outcomes, fleet.engines[0])


def slora_cost() -> StepCost:
    """Return step costs of Llama-13B on S-LoRA's A100."""
    rates = DEVICES["a100"].rates
    slower = {field.name: getattr(rates, field.name) * SLORA_SLOWDOWN for field in fields(StepRates)}
    return StepCost(LLAMA_13B, StepRates(**slower))


def slora_adapters(num_adapters: int = 400) -> Adapters:
    """Return the adapters of S-LoRA's setting S4: ranks 64, 32, 16 on q, k, v and o."""
    return Adapters(LLAMA_13B, num_adapters, (64, 32, 16))


def slora_setup() -> SimulationSetup:
    """Return S-LoRA's setting S4: Llama-13B on one A100 80GB, a pool of 65,000 tokens, adapters in host memory."""
    limits = gpu_limits(
        LLAMA_13B,
        pool_bytes=SLORA_POOL_TOKENS * LLAMA_13B.kv_bytes_per_token,
        arena_bytes=400 * GIB,
        max_model_len=MAX_MODEL_LEN,
    )
    return SimulationSetup(limits=limits, cost=slora_cost(), copy=DEVICES["a100"].copy)


def h100_setup(
    *, pool_gib: float | None = None, arena_gib: int = 1024, shape: ModelShape = LLAMA_8B
) -> SimulationSetup:
    """Return Llama-3-8B on one H100 80GB; every adapter in host memory."""
    pool_bytes = H100.pool_bytes(shape) if pool_gib is None else int(pool_gib * GIB)
    limits = gpu_limits(shape, pool_bytes=pool_bytes, arena_bytes=arena_gib * GIB, max_model_len=MAX_MODEL_LEN)
    return SimulationSetup(limits=limits, cost=StepCost(shape, H100.rates))
