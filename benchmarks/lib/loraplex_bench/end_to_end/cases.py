"""The cases of ``benchmarks/engine.py``: what each measures, on which engine, and how long it takes on one H100."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from loraplex_client.workload import SloraParams
from loraplex_engine.limits import GPU_STEP, MAX_RESIDENT_ADAPTERS, EngineLimits

from loraplex_bench.base_shapes import BF16_SHAPES, FP8_SHAPES
from loraplex_bench.end_to_end.base_shapes import run_shapes
from loraplex_bench.end_to_end.bursts import BurstSize, run_bursts, run_registered
from loraplex_bench.end_to_end.context import Bench
from loraplex_bench.end_to_end.pairs import run_pairs
from loraplex_bench.end_to_end.rates import run_rates
from loraplex_bench.end_to_end.startup import run_startup, run_startup_of_files
from loraplex_bench.end_to_end.traces import run_no_cliff, run_slora
from loraplex_bench.paths import ROOT
from loraplex_bench.rig import COMPARABLE, RigSetup
from loraplex_bench.shapes import LLAMA2_7B, LLAMA3_8B, LLAMA3_8B_FP8, AdapterFamily, Shape

GIB: Final = 2**30
ENGINE_SCRIPT: Final = ROOT / "benchmarks" / "engine.py"
QKVO: Final = AdapterFamily()
MIXED: Final = AdapterFamily(ranks=(64, 32, 16, 8))
ALL_LINEAR: Final = AdapterFamily(targets="all")
STANDARD: Final = BurstSize()
HALF: Final = BurstSize(num_requests=256)
SPARE_SEQS: Final = 4
BASELINE_STEP: Final = (256, 8192)
"""Sequences and tokens of one step, as the peers that rows stand beside were run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure.

    Attributes:
        about: What, in a line.
        seconds: About how long on one H100, start-up included, kernels compiled already.
    """

    about: str
    seconds: int
    run: Callable[[Bench], object]


def setup_of(shape: Shape, family: AdapterFamily, num_adapters: int = 200, **sizes: Any) -> RigSetup:
    """Return the baselines' limits on a shape; ``sizes``, named as in `EngineLimits`, replaces some."""
    limits = EngineLimits(
        pool=shape.pool,
        num_pages=int(shape.pool_gib * GIB) // shape.pool.page_bytes,
        max_model_len=1280,
        max_num_seqs=BASELINE_STEP[0],
        max_num_batched_tokens=BASELINE_STEP[1],
        max_resident_adapters=256,
        policy=COMPARABLE,
    )
    return RigSetup(shape=shape, family=family, num_adapters=num_adapters, limits=replace(limits, **sizes))


def kv_pages(shape: Shape, num_seqs: int, size: BurstSize) -> int:
    """Return the pool's pages for that many sequences of a burst."""
    return num_seqs * shape.pool.num_blocks(size.prompt_tokens + size.output_tokens)


def kv_bytes(shape: Shape, num_seqs: int, size: BurstSize) -> int:
    """Return pool bytes for that many sequences of a burst."""
    return kv_pages(shape, num_seqs, size) * shape.pool.page_bytes


def default_limits(shape: Shape, family: AdapterFamily) -> RigSetup:
    """Return the engine's own defaults for sequences, batched tokens, table and length on a GPU."""
    return setup_of(
        shape,
        family,
        max_model_len=shape.info.max_position_embeddings,
        max_num_seqs=GPU_STEP[0],
        max_num_batched_tokens=GPU_STEP[1],
        max_resident_adapters=MAX_RESIDENT_ADAPTERS,
    )


def side_by_side(shape: Shape, family: AdapterFamily, num_seqs: int, size: BurstSize) -> RigSetup:
    """Return an engine of which two fit a device: KV for ``num_seqs``, room for growth, and 32 adapters.

    Without that room, the pages that admission keeps free would keep the last sequence out for a whole generation.
    """
    pages = kv_pages(shape, num_seqs + SPARE_SEQS, size) + family.total_pages(shape, 32)
    return setup_of(shape, family, 32, num_pages=pages, max_num_seqs=num_seqs)


def startup_case(shape: Shape) -> Case:
    """Return the start-up case of a shape."""
    command = [sys.executable, str(ENGINE_SCRIPT), "--startup-child", shape.name]
    return Case(
        about=f"process start to first token, {shape.name}, cold and warm kernel cache",
        seconds=90,
        run=lambda bench: run_startup(bench, shape.name, command),
    )


def rates_case(shape: Shape, where: str, rates: tuple[float, ...]) -> Case:
    """Return a case of S-LoRA traces at several rates, for the simulator's error."""
    return Case(
        about=f"{shape.name}, all seven r16, S-LoRA traces {where} capacity, for the simulator's error",
        seconds=90,
        run=lambda bench: run_rates(bench, setup_of(shape, ALL_LINEAR), rates, duration_s=25, warm=STANDARD),
    )


def gpu_cases() -> dict[str, Case]:
    """Return the cases by name."""
    return {
        **burst_cases(LLAMA2_7B, LLAMA3_8B),
        **trace_cases(LLAMA2_7B),
        **other_cases(LLAMA2_7B, LLAMA3_8B),
        **fp8_cases(),
        **base_cases(),
    }


def burst_cases(seven: Shape, eight: Shape) -> dict[str, Case]:
    """Return the cases whose requests all come at once."""
    standard = setup_of(seven, QKVO)
    return {
        "bursts-7b": Case(
            about="Llama-2-7B, q,k,v,o r16, bursts over 0/1/32/128/200 adapters",
            seconds=60,
            run=lambda bench: run_bursts(bench, standard, (0, 1, 32, 128, 200), size=STANDARD),
        ),
        "bursts-7b-mixed": Case(
            about="the same, ranks 64/32/16/8, 0 and 200 adapters",
            seconds=40,
            run=lambda bench: run_bursts(bench, setup_of(seven, MIXED), (0, 200), size=STANDARD),
        ),
        "bursts-8b": Case(
            about="Llama-3-8B, all seven r16, bursts over 0/32/200 adapters",
            seconds=45,
            run=lambda bench: run_bursts(bench, setup_of(eight, ALL_LINEAR), (0, 32, 200), size=STANDARD),
        ),
        "default-7b": Case(
            about="Llama-2-7B bursts over 0/200 adapters with the engine's default limits",
            seconds=35,
            run=lambda bench: run_bursts(
                bench, default_limits(seven, QKVO), (0, 200), size=STANDARD, label="default limits"
            ),
        ),
        "default-8b": Case(
            about="Llama-3-8B bursts over 0/200 adapters with the engine's default limits",
            seconds=40,
            run=lambda bench: run_bursts(
                bench, default_limits(eight, ALL_LINEAR), (0, 200), size=STANDARD, label="default limits"
            ),
        ),
        "registered-7b": Case(
            about="2,000 adapters in the arena, 512 of them loaded in the burst, against 200 (63 GiB of pinned memory)",
            seconds=75,
            run=lambda bench: run_registered(
                bench, setup_of(seven, QKVO, 2000, max_resident_adapters=1024), few=200, size=STANDARD
            ),
        ),
    }


def fp8_cases() -> dict[str, Case]:
    """Return the cases of linear layers in FP8, of keys and values in FP8 too, and of both with twice as many sequences."""

    def bursts(about: str, shape: Shape, label: str, max_num_seqs: int = BASELINE_STEP[0]) -> Case:
        setup = setup_of(shape, ALL_LINEAR, max_num_seqs=max_num_seqs)
        return Case(
            about=f"Llama-3-8B, {about}, all seven r16, bursts over 0/32/200 adapters",
            seconds=45,
            run=lambda bench: run_bursts(bench, setup, (0, 32, 200), size=STANDARD, label=label),
        )

    fp8_kv = replace(LLAMA3_8B_FP8, kv_dtype="fp8")
    all_at_once = STANDARD.num_requests
    return {
        "bursts-8b-fp8": bursts("linear layers in FP8", LLAMA3_8B_FP8, "FP8"),
        "bursts-8b-fp8-kv": bursts("linear layers, keys and values in FP8", fp8_kv, "FP8, FP8 KV"),
        "bursts-8b-512": bursts("512 sequences at once", LLAMA3_8B, "512 sequences", all_at_once),
        "bursts-8b-fp8-512": bursts(
            "linear layers in FP8, 512 sequences at once", LLAMA3_8B_FP8, "FP8, 512 sequences", all_at_once
        ),
    }


def base_cases() -> dict[str, Case]:
    """Return the cases of other base models beside Llama-3-8B, and of a start that reads files."""

    def shapes(shapes: tuple[Shape, ...]) -> Case:
        names = ", ".join(shape.name for shape in shapes)
        setups = [setup_of(shape, ALL_LINEAR, 32) for shape in shapes]
        return Case(
            about=f"{names}: bursts over 0/32 adapters and a decode step of 64 rows, beside the first's floor",
            seconds=50 * len(shapes),
            run=lambda bench: run_shapes(bench, setups, (0, 32), size=STANDARD),
        )

    command = [sys.executable, str(ENGINE_SCRIPT), "--startup-child", LLAMA3_8B_FP8.name]
    return {
        "shapes-bf16": shapes(BF16_SHAPES),
        "shapes-fp8": shapes(FP8_SHAPES),
        "startup-8b-fp8": Case(
            about="process start to first token, Llama-3-8B in FP8 from 9 GB of files, cold and warm kernel cache",
            seconds=150,
            run=lambda bench: run_startup_of_files(
                bench, LLAMA3_8B_FP8.info, command, "--files", device=torch.device("cuda", 0)
            ),
        ),
    }


def trace_cases(seven: Shape) -> dict[str, Case]:
    """Return the cases of S-LoRA's synthetic traces."""
    standard = setup_of(seven, QKVO)
    return {
        "slora-7b": Case(
            about="S-LoRA trace, 200 adapters r16, 20 req/s",
            seconds=80,
            run=lambda bench: run_slora(bench, standard, SloraParams(), warm=STANDARD),
        ),
        "slora-7b-base": Case(
            about="the same requests without adapters",
            seconds=80,
            run=lambda bench: run_slora(bench, standard, SloraParams(num_adapters=0), warm=STANDARD),
        ),
        "slora-7b-mixed": Case(
            about="S-LoRA trace, ranks 64/32/16/8",
            seconds=90,
            run=lambda bench: run_slora(bench, setup_of(seven, MIXED), SloraParams(), warm=STANDARD),
        ),
    }


def other_cases(seven: Shape, eight: Shape) -> dict[str, Case]:
    """Return what LoRA costs where no request uses it, the missing cliff, the simulator's rates, and the start."""
    return {
        "lora-off-7b": Case(
            about="no adapter asked for: LoRA enabled against disabled, Llama-2-7B, 5 interleaved pairs",
            seconds=75,
            run=lambda bench: run_pairs(bench, side_by_side(seven, QKVO, 128, HALF), size=HALF),
        ),
        "lora-off-8b": Case(
            about="the same, Llama-3-8B",
            seconds=55,
            run=lambda bench: run_pairs(bench, side_by_side(eight, ALL_LINEAR, 256, HALF), size=HALF),
        ),
        "no-cliff-7b": Case(
            about="256 adapters, room for 64, against room for all, at 0.7 of capacity",
            seconds=85,
            run=lambda bench: run_no_cliff(
                bench, setup_of(seven, QKVO, 256, max_num_seqs=128), num_resident=64, size=HALF, duration_s=20
            ),
        ),
        "rates-8b-below": rates_case(eight, "below", (14.0, 20.0)),
        "rates-8b-beyond": rates_case(eight, "beyond", (48.0, 56.0)),
        "startup-7b": startup_case(seven),
    }
