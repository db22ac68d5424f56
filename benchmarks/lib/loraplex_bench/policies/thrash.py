"""More active adapters than fit: how throughput and the 99th percentile of the first token's wait fall and rise.

Llama-3-8B on one H100, adapters of rank 16 on all projections, popularity uniform, which is the hardest; the pool holds KV
for a full batch and `FITTING` adapters. Compared in the same run with least-recently-used eviction and with fixed slots.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex_client.charts import Axis, Series, line_chart
from loraplex_client.workload import SloraParams, slora_trace
from loraplex_engine.limits import SchedulingPolicy
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.shapes import ALL_TARGETS

from loraplex_bench.policies.figures import Figure
from loraplex_bench.policies.fixed_shares import RECENCY, FixedShares
from loraplex_bench.policies.runs import LLAMA_8B, h100_setup, replay

if TYPE_CHECKING:
    from loraplex_engine.simulation.setup import SimulationSetup

    from loraplex_bench.policies.figures import Report

SECTION: Final = "thrash"
FITTING: Final = 64
NUM_SEQS: Final = 128
STEP: Final = 1.2
FACTORS: Final = tuple(STEP**power for power in range(17))  # 1 to 18.5
ASKED: Final = (2.0, 4.0, 16.0)
LOAD: Final = 0.7
MAX_NEIGHBOUR: Final = 1.25
MAX_LOSS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Point:
    """One number of active adapters.

    Attributes:
        factor: Active adapters over those that fit.
        throughput: Output tokens per second, of more requests than can be served.
        p99_s: Wait for the first token at `LOAD` of what our policy serves when all fit.
    """

    factor: float
    throughput: float
    p99_s: float
    resident_share: float


def setups() -> dict[str, SimulationSetup]:
    """Return the policies by name; all have the same pool."""
    kv_pages = NUM_SEQS * LLAMA_8B.pool.num_blocks(1024)
    adapter_pages = FITTING * LLAMA_8B.adapter(16, ALL_TARGETS).num_pages
    ours = h100_setup().with_limits(num_pages=kv_pages + adapter_pages, max_num_seqs=NUM_SEQS)
    lru = replace(ours.with_limits(policy=SchedulingPolicy(enable_warming=False)), page_worth=RECENCY)
    kv_share = kv_pages / (kv_pages + adapter_pages)
    return {
        "loraplex": ours,
        "LRU": lru,
        f"{FITTING} fixed slots": replace(
            lru.with_limits(max_resident_adapters=FITTING), page_sources=FixedShares(kv_share)
        ),
    }


def measure(setup: SimulationSetup, factor: float, capacity: float) -> Point:
    """Replay an overload for throughput and a moderate load for waits."""
    num_adapters = round(FITTING * factor)
    adapters = Adapters(LLAMA_8B, num_adapters, (16,), ALL_TARGETS)
    over = slora_trace(SloraParams(num_adapters=num_adapters, rate=4 * capacity, duration_s=1500 / (4 * capacity)))
    rate = LOAD * capacity
    calm = slora_trace(SloraParams(num_adapters=num_adapters, rate=rate, duration_s=2500 / rate))
    full, waits = replay(setup, adapters, over).summary, replay(setup, adapters, calm).summary
    return Point(factor, full.output_tokens_per_s, waits.ttft_p99_s, waits.resident_share)


def run(report: Report) -> None:
    """Measure all policies on the grid."""
    found = {name: [] for name in setups()}  # type: dict[str, list[Point]]
    capacity = 0.0
    for name, setup in setups().items():
        capacity = capacity or _capacity(setup)
        for factor in sorted({*FACTORS, *ASKED}):
            found[name].append(measure(setup, factor, capacity))
    report.note(f"capacity with {FITTING} active adapters: {capacity:.1f} requests/s; waits at {LOAD} of it")
    for factor in (1.0, *ASKED):
        for name, points in found.items():
            _point(report, name, next(point for point in points if point.factor == factor))
    _bounds(report, found["loraplex"])
    _plots(report, found)


def _capacity(setup: SimulationSetup) -> float:
    """Return the requests per second that an engine serves when all adapters fit."""
    adapters = Adapters(LLAMA_8B, FITTING, (16,), ALL_TARGETS)
    trace = slora_trace(SloraParams(num_adapters=FITTING, rate=200.0, duration_s=10.0))
    return replay(setup, adapters, trace).summary.requests_per_s


def _point(report: Report, name: str, point: Point) -> None:
    case = f"{name}, {point.factor:g}x"
    for metric, value, unit in (
        ("out_tok_per_s", point.throughput, "tok/s"),
        ("ttft_p99_s", point.p99_s, "s"),
        ("found on device", point.resident_share, "share"),
    ):
        report.add(Figure(section=SECTION, case=case, metric=metric, value=value, unit=unit))


def _bounds(report: Report, points: list[Point]) -> None:
    by_factor = {point.factor: point for point in points}
    grid = [by_factor[factor] for factor in FACTORS]
    case = f"{len(grid)} steps of {STEP}x"
    for metric, values in (
        ("throughput, worst neighbours", [point.throughput for point in grid]),
        ("ttft p99, worst neighbours", [point.p99_s for point in grid]),
    ):
        worst = max(max(a / b, b / a) for a, b in itertools.pairwise(values))
        report.add(Figure(section=SECTION, case=case, metric=metric, value=worst, unit="x", at_most=MAX_NEIGHBOUR))
    loss = 1 - by_factor[4.0].throughput / by_factor[1.0].throughput
    report.add(
        Figure(section=SECTION, case="4x", metric="loss of throughput", value=loss, unit="share", at_most=MAX_LOSS)
    )


def _plots(report: Report, found: dict[str, list[Point]]) -> None:
    x = Axis(label=f"active adapters / adapters that fit ({FITTING})", is_log=True)
    throughput = [Series(name, [(p.factor, p.throughput) for p in points]) for name, points in found.items()]
    waits = [Series(name, [(p.factor, p.p99_s * 1e3) for p in points]) for name, points in found.items()]
    report.plot(
        "policies-thrash-throughput.svg",
        line_chart("More adapters than fit: throughput", x, Axis(label="output tokens/s"), throughput),
    )
    report.plot(
        "policies-thrash-p99.svg",
        line_chart(
            "More adapters than fit: 99th percentile of the first token",
            x,
            Axis(label="milliseconds", is_log=True),
            waits,
        ),
    )
