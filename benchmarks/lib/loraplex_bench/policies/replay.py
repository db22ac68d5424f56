"""How long a replay of a million requests over a hundred thousand adapters takes on one core of this machine."""

from __future__ import annotations

import math
import resource
import time
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import Trace, zipf_adapters
from loraplex_engine.simulation.adapters import Adapters

from loraplex_bench.policies.figures import Figure
from loraplex_bench.policies.runs import LLAMA_8B, h100_setup, replay

if TYPE_CHECKING:
    from loraplex_bench.policies.figures import Report

SECTION: Final = "replay"
NUM_REQUESTS: Final = 1_000_000
NUM_ADAPTERS: Final = 100_000
RATE: Final = 20.0
MAX_CPU_S: Final = 1200.0
MAX_GIB: Final = 8.0


def make_trace(num_requests: int) -> Trace:
    """Return Poisson arrivals over adapters of Zipf's popularity, S-LoRA's lengths."""
    generator = np.random.default_rng(0)
    return Trace.of(
        np.cumsum(generator.exponential(1 / RATE, num_requests)),
        adapter=zipf_adapters(NUM_ADAPTERS, num_requests, exponent=1.0, generator=generator),
        prompt_tokens=generator.integers(8, 512, num_requests),
        output_tokens=generator.integers(8, 512, num_requests),
    )


def run(report: Report) -> None:
    """Replay; most adapters have to come from the store, whose images the arena holds a part of."""
    num_requests = report.replay_requests or NUM_REQUESTS
    adapters = Adapters(LLAMA_8B, NUM_ADAPTERS, (8, 16, 32))
    setup = h100_setup(arena_gib=200)
    trace = make_trace(num_requests)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    replayed = replay(setup, adapters, trace, slo_ttft_s=1.0)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    case = f"{num_requests:,} requests over {NUM_ADAPTERS:,} adapters"
    report.note(
        f"{case}: {replayed.summary.wall_s:,.0f} s of virtual time, {replayed.engine.num_turns:,} turns of the loop, "
        f"{replayed.engine.scheduler.counters.num_steps:,} steps, {cpu_s:.0f} s of CPU time, wall {wall_s:.0f} s; "
        f"adapter on the device {replayed.summary.resident_share:.1%}, in the arena {replayed.summary.arena_share:.1%}"
    )
    _add(report, f"{case}, per request", "cpu", cpu_s / num_requests * 1e6, "us")
    _add(report, case, "ended", float(replayed.summary.num_done), "req", at_least=float(num_requests))
    is_full = num_requests == NUM_REQUESTS
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    full_case = f"{NUM_REQUESTS:,} requests over {NUM_ADAPTERS:,} adapters"
    _add(report, full_case, "cpu", cpu_s if is_full else math.nan, "s", at_most=MAX_CPU_S)
    _add(report, full_case, "peak memory", peak_gib if is_full else math.nan, "GiB", at_most=MAX_GIB)


def _add(
    report: Report,
    case: str,
    metric: str,
    value: float,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric=metric,
            value=value,
            unit=unit,
            at_least=at_least,
            at_most=at_most,
        )
    )
