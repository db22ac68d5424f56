"""How long a replay of a million requests over a hundred thousand adapters takes on one core of this machine."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import Trace, zipf_adapters
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.devices import GIB

from loraplex_bench.policy_figures import Figure
from loraplex_bench.policy_runs import LLAMA_8B, h100_setup, replay

if TYPE_CHECKING:
    from loraplex_bench.policy_figures import Report

SECTION: Final = "replay"
NUM_REQUESTS: Final = 1_000_000
NUM_ADAPTERS: Final = 100_000
RATE: Final = 20.0
MAX_CPU_S: Final = 1200.0


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
    adapters = Adapters(LLAMA_8B, NUM_ADAPTERS, (8, 16, 32))
    setup = replace(h100_setup(), arena_bytes=200 * GIB)
    trace = make_trace(NUM_REQUESTS)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    replayed = replay(setup, adapters, trace, slo_ttft_s=1.0)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    case = f"{NUM_REQUESTS:,} requests over {NUM_ADAPTERS:,} adapters"
    report.note(
        f"{case}: {replayed.summary.wall_s:,.0f} s of virtual time, {replayed.engine.num_turns:,} turns of the loop, "
        f"{replayed.engine.scheduler.counters.num_steps:,} steps, wall {wall_s:.0f} s"
    )
    for metric, value, unit, bound in (
        ("cpu_s", cpu_s, "s", MAX_CPU_S),
        ("peak_memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB", 8.0),
    ):
        report.add(Figure(section=SECTION, case=case, metric=metric, value=value, unit=unit, at_most=bound))
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="ended",
            value=float(replayed.summary.num_done),
            unit="req",
            at_least=float(NUM_REQUESTS),
        )
    )
