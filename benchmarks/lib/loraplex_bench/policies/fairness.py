"""A noisy tenant beside a steady one, and the service that two backlogged tenants get.

Llama-3-8B on one H100, simulated. Capacity is what one engine finishes of more requests than it can serve; a fair share is
an eighth of it. The steady tenant sends half of its share. Source of the service bound: Sheng et al., "Fairness in Serving
Large Language Models", arXiv:2401.00588, theorem 4.4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import Trace
from loraplex_engine.scheduler.fair_shares import OUTPUT_WEIGHT, PROMPT_WEIGHT
from loraplex_engine.simulation.adapters import Adapters

from loraplex_bench.policies.figures import Figure
from loraplex_bench.policies.runs import LLAMA_8B, Replayed, h100_setup, replay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.simulation.engine import SimulatedEngine

    from loraplex_bench.policies.figures import Report

SECTION: Final = "fairness"
NUM_TENANTS: Final = 8
ADAPTERS_PER_TENANT: Final = 4
DURATION_S: Final = 200.0
LENGTHS: Final = (8, 512)
STEADY, NOISY = 0, 1
MAX_RATIO: Final = 1.3
LONGEST_STEPS: Final = 2


def make_trace(rates: Sequence[float], duration_s: float) -> Trace:
    """Return Poisson arrivals of tenants with a rate each; a tenant's requests are the same beside whatever others."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("t", "tenant", "adapter", "prompt", "output")}
    for tenant, rate in enumerate(rates):
        generator, count = np.random.default_rng(tenant), int(rate * duration_s)
        columns["t"].append(np.sort(generator.random(count)) * duration_s)
        columns["tenant"].append(np.full(count, tenant))
        own = generator.integers(0, ADAPTERS_PER_TENANT, count)
        columns["adapter"].append(tenant * ADAPTERS_PER_TENANT + own)
        columns["prompt"].append(generator.integers(*LENGTHS, count))
        columns["output"].append(generator.integers(*LENGTHS, count))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Trace.of(
        joined["t"],
        tenant=joined["tenant"],
        adapter=joined["adapter"],
        prompt_tokens=joined["prompt"],
        output_tokens=joined["output"],
    )


def simulate(rates: Sequence[float], duration_s: float, watch: Gap | None = None) -> tuple[Trace, Replayed]:
    """Replay tenants with the default policy."""
    trace = make_trace(rates, duration_s)
    adapters = Adapters(LLAMA_8B, NUM_TENANTS * ADAPTERS_PER_TENANT, (16,))
    return trace, replay(h100_setup(), adapters, trace, watch=watch)


def p99_of(trace: Trace, replayed: Replayed, tenant: int) -> float:
    """Return the 99th percentile of a tenant's waits for first tokens, seconds."""
    waits = (replayed.outcomes.first_token_s - trace.arrival_s)[trace.tenant == tenant]
    return float(np.percentile(waits, 99))


@dataclass
class Gap:
    """Watches how far the services of two backlogged tenants are apart.

    Attributes:
        largest: Greatest change of the difference over any stretch in which both have requests waiting.
    """

    largest: float = 0.0
    _differences: list[float] = field(default_factory=list)

    def __call__(self, engine: SimulatedEngine) -> None:
        """Look at the counters; a stretch ends when one of the two has no request waiting."""
        queue = engine.scheduler.queue
        waiting = {request.submission.fairness_key for request in queue.eligible}
        if len(waiting) < 2:
            self._close()
            return
        services = [queue.shares.service_of(f"tenant-{tenant}") for tenant in (0, 1)]
        self._differences.append(services[0] - services[1])
        if len(self._differences) >= 4096:
            self._close(keep=True)

    def _close(self, *, keep: bool = False) -> None:
        if self._differences:
            low, high = min(self._differences), max(self._differences)
            self.largest = max(self.largest, high - low)
            self._differences = [low, high] if keep else []


def run(report: Report) -> None:
    """Compare a steady tenant's waits, and two tenants' services."""
    _, full = simulate([50.0] * NUM_TENANTS, 5.0)
    share = full.summary.requests_per_s / NUM_TENANTS
    report.note(f"capacity {share * NUM_TENANTS:.1f} requests/s, a share {share:.2f}, {DURATION_S:.0f} s each")
    steady = 0.5 * share
    trace, alone = simulate([steady], DURATION_S)
    alone_p99_s = p99_of(trace, alone, STEADY)
    for load, noisy_shares in (("0.86 of capacity", 6.4), ("1.31 of capacity", 10.0)):
        others = (noisy_shares - 1) / (NUM_TENANTS - 2)
        trace, fair = simulate([steady, share, *[others * share] * (NUM_TENANTS - 2)], DURATION_S)
        fair_p99_s = p99_of(trace, fair, STEADY)
        trace, noisy = simulate([steady, noisy_shares * share], DURATION_S)
        _waits(report, f"noisy sends {noisy_shares:g} shares, {load}", alone_p99_s, fair_p99_s, trace, noisy)
    _services(report, share)


def _waits(report: Report, case: str, alone_p99_s: float, fair_p99_s: float, trace: Trace, noisy: Replayed) -> None:
    p99_s, longest_s = p99_of(trace, noisy, STEADY), noisy.engine.longest_step_s
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="steady p99 / with fair neighbours",
            value=p99_s / fair_p99_s,
            unit="x",
            at_most=MAX_RATIO,
        )
    )
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="steady p99",
            value=p99_s,
            unit="s",
            at_most=alone_p99_s + LONGEST_STEPS * longest_s,
            peer=f"alone, longest step {longest_s:.3f} s",
            peer_value=alone_p99_s,
        )
    )
    report.add(Figure(section=SECTION, case=case, metric="noisy p99", value=p99_of(trace, noisy, NOISY), unit="s"))


def _services(report: Report, share: float) -> None:
    """Two tenants of which each wants more than the engine has; one of them twice as much as the other."""
    gap = Gap()
    _, replayed = simulate([8 * share, 16 * share], DURATION_S / 4, watch=gap)
    limits = replayed.engine.setup.limits
    most_tokens = min(limits.max_num_seqs * (LENGTHS[1] + LENGTHS[1]), limits.num_pages * limits.block_tokens)
    bound = 2 * max(PROMPT_WEIGHT * LENGTHS[1], OUTPUT_WEIGHT * most_tokens)
    report.add(
        Figure(
            section=SECTION,
            case="two backlogged tenants, rates 1 : 2",
            metric="difference of services",
            value=gap.largest,
            unit="tokens",
            at_most=bound,
        )
    )
