"""The JSON that asks for a simulation and the JSON that answers, version 1 (docs/adr/0016-simulator.md)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from loraplex_engine.limits import GPU_STEP
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.copies import SHARED_MEMORY_STORE
from loraplex_engine.simulation.devices import DEVICES, GIB, Device, rank_weight_bytes
from loraplex_engine.simulation.fleet import Fleet, Routing
from loraplex_engine.simulation.measured import TARGETS
from loraplex_engine.simulation.outcomes import summarize
from loraplex_engine.simulation.setup import SimulationSetup, gpu_limits
from loraplex_engine.simulation.shapes import ModelShape, ShapeError, base_model, base_model_from_config
from loraplex_engine.simulation.step_cost import DECODE_ROW, StepCost
from loraplex_engine.simulation.trace import TraceArrays, TraceError, load_trace

KV_CACHE_DTYPES: Final = {"auto": "", "fp8": "fp8"}
"""``--kv-cache-dtype``, and what `PoolGeometry` calls it."""
MAX_ENGINES: Final = 1024
MAX_RANKS: Final = 64


class QuestionError(ValueError):
    """The question cannot be understood; the message names the field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked: how a fleet would serve a trace.

    Attributes:
        model: Name of a known model, or any name with ``config``.
        config: The model's ``config.json``; empty for a known model.
        gpu: Name of a device.
        trace: Path of an ``.npz`` with the columns of `SavedTrace`.
        num_adapters: Adapters that the trace may name.
        ranks: Adapter i has rank ``ranks[i % len(ranks)]``.
        targets: ``qkvo`` or ``all``.
        num_engines: Engines, of ``tensor_parallel`` GPUs each.
        routing: ``affinity`` or ``random``.
        slo_ttft_s: Objective for the first token.
        slo_tpot_s: Objective for the mean time of a request's other tokens; None for none.
        arena_bytes: Host memory for adapter images, per engine.
        pool_bytes: Page pool per GPU; None for what the engine takes by itself.
        max_num_seqs: Most sequences of a step; ``max_num_batched_tokens`` most tokens.
        kv_cache_dtype: ``auto`` or ``fp8``, as the engine's flag.
        text_only: Whether a multimodal model's ``config`` means its text part.
        tensor_parallel: GPUs of each engine.
    """

    model: str
    gpu: str
    trace: str
    num_adapters: int
    ranks: tuple[int, ...]
    config: dict[str, Any]
    targets: str = "all"
    num_engines: int = 1
    routing: str = "affinity"
    slo_ttft_s: float = 6.0
    slo_tpot_s: float | None = None
    arena_bytes: int = 64 * GIB
    pool_bytes: int | None = None
    max_num_seqs: int = GPU_STEP[0]
    max_num_batched_tokens: int = GPU_STEP[1]
    kv_cache_dtype: str = "auto"
    text_only: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.gpu not in DEVICES:
            raise QuestionError(f"gpu {self.gpu!r} is not one of {', '.join(DEVICES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise QuestionError(f"kv_cache_dtype {self.kv_cache_dtype!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
        if self.targets not in TARGETS:
            raise QuestionError(f"targets {self.targets!r} is not one of {', '.join(TARGETS)}")
        if self.routing not in {routing.value for routing in Routing}:
            raise QuestionError(f"routing {self.routing!r} is not one of {', '.join(r.value for r in Routing)}")
        if not 1 <= self.num_engines <= MAX_ENGINES:
            raise QuestionError(f"num_engines {self.num_engines} is not in 1..{MAX_ENGINES}")
        if not 1 <= self.tensor_parallel <= MAX_RANKS:
            raise QuestionError(f"tensor_parallel {self.tensor_parallel} is not in 1..{MAX_RANKS}")
        if self.num_adapters < 0 or (self.num_adapters and not self.ranks) or any(rank < 1 for rank in self.ranks):
            raise QuestionError(f"{self.num_adapters} adapters of ranks {list(self.ranks)} cannot be served")
        if not self.slo_ttft_s > 0 or (self.slo_tpot_s is not None and not self.slo_tpot_s > 0):
            raise QuestionError("objectives must be above 0 seconds")


def read_question(document: Any) -> Question:
    """Return the question that a JSON document asks.

    Raises:
        QuestionError: If a field is missing, unknown or wrong.
    """
    if not isinstance(document, dict):
        raise QuestionError("the question is no JSON object")
    known = {field.name for field in fields(Question)}
    if unknown := sorted(set(document) - known):
        raise QuestionError(f"unknown fields: {', '.join(unknown)}")
    try:
        given = {"config": {}, **document}
        return Question(**{**given, "ranks": tuple(int(rank) for rank in given.get("ranks", ()))})
    except TypeError as error:
        raise QuestionError(str(error)) from error


def answer(question: Question) -> dict[str, Any]:
    """Simulate and return the figures.

    Raises:
        ShapeError: If the model does not fit, or an adapter cannot be laid out.
        TraceError: If the trace cannot be read or names more adapters than there are.
    """
    device = DEVICES[question.gpu]
    shape = ModelShape(
        base_model_from_config(question.model, question.config, text_only=question.text_only)
        if question.config
        else base_model(question.model),
        kv_dtype=KV_CACHE_DTYPES[question.kv_cache_dtype],
        tp_degree=question.tensor_parallel,
    )
    adapters = Adapters(shape, question.num_adapters, question.ranks, TARGETS[question.targets])
    trace = load_trace(Path(question.trace))
    if int(trace.adapter.max()) >= len(adapters):
        raise TraceError(f"the trace names adapter {int(trace.adapter.max())}, there are {len(adapters)}")
    setup = _setup(question, device, shape, trace, adapters)
    began_s = time.perf_counter()
    fleet = Fleet(setup, adapters, trace, num_engines=question.num_engines, routing=Routing(question.routing))
    outcomes = fleet.run()
    summary = summarize(trace, outcomes, slo_ttft_s=question.slo_ttft_s, slo_tpot_s=question.slo_tpot_s)
    return {
        "summary": asdict(summary),
        "engines": [
            {
                "busy_share": engine.device_s / summary.wall_s if summary.wall_s else 0.0,
                "copy_share": engine.copies.busy_s / summary.wall_s if summary.wall_s else 0.0,
                "num_steps": engine.scheduler.counters.num_steps,
                "num_preemptions": engine.scheduler.counters.num_preemptions,
            }
            for engine in fleet.engines
        ],
        "sizes": _sizes(setup, adapters),
        "device": _described(device, question.tensor_parallel),
        "took_s": time.perf_counter() - began_s,
    }


def _setup(
    question: Question, device: Device, shape: ModelShape, trace: TraceArrays, adapters: Adapters
) -> SimulationSetup:
    limits = gpu_limits(
        shape,
        pool_bytes=question.pool_bytes or device.pool_bytes(shape),
        arena_bytes=question.arena_bytes,
        max_model_len=int((trace.prompt_tokens + trace.output_tokens).max()) + 1,
    )
    limits = replace(limits, max_num_seqs=question.max_num_seqs, max_num_batched_tokens=question.max_num_batched_tokens)
    largest = int(adapters.num_pages.max(initial=0))
    for what, room in (("pool", limits.num_pages), ("arena", limits.num_arena_slots)):
        if largest > room:
            raise ShapeError(f"the largest adapter takes {largest} pages, the {what} has {room}")
    store = replace(SHARED_MEMORY_STORE, bytes_per_s=SHARED_MEMORY_STORE.bytes_per_s / shape.tp_degree)
    return SimulationSetup(
        limits=limits, cost=StepCost(shape, device.rates, device.link), copy=device.copy, store=store
    )  # each rank copies its own image beside the others; the store writes those of all, one after another


def _described(device: Device, degree: int) -> dict[str, Any]:
    """Return where the rates come from: collectives of several ranks are not measured on any device."""
    link = device.link
    source = "" if device.is_measured else device.source
    if degree > 1:
        text = f"collectives by {link.bytes_per_s / 1e9:.0f} GB/s of a data sheet and an assumed {link.latency_s * 1e6:.0f} us each"
        source = f"{source}, {text}" if source else text
    return {"name": device.name, "is_measured": not source, "source": source or device.source}


def _sizes(setup: SimulationSetup, adapters: Adapters) -> dict[str, float]:
    """Return what fits where on each GPU, for people, and the least that a decode step takes."""
    limits, cost = setup.limits, setup.cost
    mean_pages = float(np.mean(adapters.num_pages)) if len(adapters) else 0.0
    shape, row = cost.shape, DECODE_ROW
    return {
        "weight_bytes": rank_weight_bytes(shape),
        "adapter_bytes_mean": float(np.mean(adapters.weight_bytes)) if len(adapters) else 0.0,
        "step_floor_s": cost.seconds(row),
        "collective_s": cost.collective_s(row),
        "page_bytes": limits.page_bytes,
        "pool_pages": limits.num_pages,
        "pool_kv_tokens": limits.num_pages * limits.block_tokens,
        "adapter_pages_mean": mean_pages,
        "arena_adapters": limits.num_arena_slots / mean_pages if mean_pages else 0.0,
        "pool_adapters": limits.num_pages / mean_pages if mean_pages else 0.0,
    }
