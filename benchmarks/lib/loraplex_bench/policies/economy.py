"""One economy of pages against every fixed split of the pool into KV and adapters, on three traces.

Llama-3-8B on one H100, simulated, adapters of rank 16 on all projections; more requests than can be served, so that the
figure is throughput. A fixed split uses the same rules inside each side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.charts import Axis, Series, line_chart
from loraplex_client.workload import ConversationShape, Trace, conversations, merge, zipf_adapters
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.shapes import ALL_TARGETS

from loraplex_bench.policies.figures import Figure
from loraplex_bench.policies.fixed_shares import FixedShares
from loraplex_bench.policies.runs import LLAMA_8B, h100_setup, replay

if TYPE_CHECKING:
    from loraplex_bench.policies.figures import Report

SECTION: Final = "economy"
SPLITS: Final = tuple(round(0.1 * tenths, 1) for tenths in range(1, 10))
NUM_ADAPTERS: Final = 600
POOL_GIB: Final = 40.0
MAX_LEN: Final = 8192
BEST_SHARE: Final = 0.97
WORST_FACTOR: Final = 1.3


def many_adapters(num_requests: int = 2500, *, seed: int = 1) -> Trace:
    """Return short requests over many adapters of mild popularity: adapters matter, KV hardly."""
    generator = np.random.default_rng(seed)
    return Trace.of(
        np.cumsum(generator.exponential(1 / 60.0, num_requests)),
        adapter=zipf_adapters(NUM_ADAPTERS, num_requests, exponent=0.5, generator=generator),
        prompt_tokens=generator.integers(32, 256, num_requests),
        output_tokens=generator.integers(32, 256, num_requests),
    )


def long_contexts(num_requests: int = 700, *, seed: int = 2) -> Trace:
    """Return long prompts over few adapters: KV matters, adapters hardly."""
    generator = np.random.default_rng(seed)
    return Trace.of(
        np.cumsum(generator.exponential(1 / 20.0, num_requests)),
        adapter=zipf_adapters(16, num_requests, exponent=1.0, generator=generator),
        prompt_tokens=generator.integers(1024, 4096, num_requests),
        output_tokens=generator.integers(256, 1024, num_requests),
    )


def shifting() -> Trace:
    """Return both kinds, one after the other and back, with conversations whose turns repeat what was said."""
    talks = conversations(
        ConversationShape(
            num_conversations=150,
            rate=10.0,
            num_adapters=40,
            mean_turns=4.0,
            user_range=(64, 512),
            output_range=(64, 384),
            think_s=3.0,
            max_model_len=MAX_LEN,
            seed=3,
        )
    )
    first, second = many_adapters(1200, seed=4), long_contexts(300, seed=5)
    later = replace(second, arrival_s=second.arrival_s + first.arrival_s[-1])
    again = many_adapters(800, seed=6)
    last = replace(again, arrival_s=again.arrival_s + later.arrival_s[-1] + 20.0)
    return merge(first, later, last, talks)


TRACES: Final = {"many adapters": many_adapters, "long contexts": long_contexts, "shifting": shifting}


def throughput(trace: Trace, kv_share: float | None) -> float:
    """Return output tokens per second under one split, or under the economy."""
    adapters = Adapters(LLAMA_8B, NUM_ADAPTERS, (16,), ALL_TARGETS)
    setup = h100_setup(pool_gib=POOL_GIB).with_limits(max_model_len=MAX_LEN)
    if kv_share is not None:
        setup = replace(setup, page_sources=FixedShares(kv_share))
    return replay(setup, adapters, trace).summary.output_tokens_per_s


def run(report: Report) -> None:
    """Compare on each trace."""
    series = []
    for name, make in TRACES.items():
        trace = make()
        joint = throughput(trace, None)
        fixed = {split: throughput(trace, split) for split in SPLITS}
        best, worst = max(fixed, key=fixed.__getitem__), min(fixed, key=fixed.__getitem__)
        for what, split, bound in (("best", best, BEST_SHARE), ("worst", worst, WORST_FACTOR)):
            report.add(
                Figure(
                    section=SECTION,
                    case=f"{name}, economy / {what} fixed split",
                    metric="throughput",
                    value=joint / fixed[split],
                    unit="x",
                    at_least=bound,
                    peer=f"KV {split:.0%}, tok/s",
                    peer_value=fixed[split],
                )
            )
        series.append(Series(f"{name}, fixed split", [(split, value / joint) for split, value in fixed.items()]))
    series.append(Series("one economy", [(0.0, 1.0), (1.0, 1.0)], is_dashed=True))
    report.plot(
        "policies-economy.svg",
        line_chart(
            "Throughput of fixed splits of the pool, one economy = 1",
            Axis(label="share of the pool for KV", low=0.0, high=1.0),
            Axis(label="of the economy's", low=0.0),
            series,
        ),
    )
