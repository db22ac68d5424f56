"""What the scheduler costs the host: microseconds per steady decode step, bytes per known adapter."""

from __future__ import annotations

import importlib.util
import tracemalloc
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_engine.adapter_cache import AdapterCache
from loraplex_engine.arena import HostArena
from loraplex_engine.page_pool import PagePool
from loraplex_engine.simulation.adapters import Adapters

from loraplex_bench.paths import ROOT
from loraplex_bench.policy_figures import Figure
from loraplex_bench.policy_runs import LLAMA_8B

if TYPE_CHECKING:
    from loraplex_bench.policy_figures import Report

SECTION: Final = "cost"
NUM_KNOWN: Final = 10_000
MAX_STEP_US: Final = 300.0
MAX_ADAPTER_BYTES: Final = 2048.0


def run(report: Report) -> None:
    """Time steps in a busy scheduler, and weigh adapters."""
    script: Any = _scheduler_cost()
    samples = script.measure(num_running=256, num_waiting=2000, num_adapters=NUM_KNOWN, num_steps=2000)
    together = np.asarray(samples).sum(axis=1) * 1e6
    case = "256 running, 2,000 waiting, 10,000 known adapters"
    report.note("the fastest decile is the code's cost, the rest is what else the machine does")
    for percent, name, bound in ((10, "fastest decile", MAX_STEP_US), (50, "median", None), (99, "p99", None)):
        report.add(
            Figure(
                section=SECTION,
                case=f"{case}, {name}",
                metric="schedule+update",
                value=float(np.percentile(together, percent)),
                unit="us",
                at_most=bound,
            )
        )
    report.add(
        Figure(
            section=SECTION,
            case=f"{NUM_KNOWN:,} known adapters in the arena",
            metric="bytes per adapter",
            value=adapter_bytes(NUM_KNOWN),
            unit="B",
            at_most=MAX_ADAPTER_BYTES,
        )
    )


def _scheduler_cost() -> object:
    """Return the benchmark script as a module."""
    path = ROOT / "benchmarks" / "scheduler_cost.py"
    spec = importlib.util.spec_from_file_location("scheduler_cost", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapter_bytes(count: int) -> float:
    """Return what the cache keeps per adapter, spec, slots and arrival rate included."""
    adapters = Adapters(LLAMA_8B, count, (8,))
    specs = [adapters.spec(index) for index in range(count)]
    arena = HostArena(int(adapters.num_pages.sum()), 1)
    try:
        cache = AdapterCache(
            pool=PagePool(1000), arena=arena, max_resident=64, emit=lambda _event: None, clock=lambda: 1.0
        )
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for spec, num_pages in zip(specs, adapters.num_pages.tolist(), strict=True):
            slots = arena.allocate(num_pages)
            if slots is None:
                raise RuntimeError("the arena is too small")
            cache.image_arrived(spec, slots)
            cache.count_arrival(spec.digest)
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    finally:
        arena.close()
    return used / count
