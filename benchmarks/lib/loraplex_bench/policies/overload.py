"""Overload as in S-LoRA's table: attainment at 1.5 times the knee, with S-LoRA's own parameters, simulated.

Source: Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv:2311.03285, section 6 and tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_client.charts import Axis, Series, line_chart
from loraplex_client.workload import SloraParams, slora_trace
from loraplex_engine.limits import QueuePolicy, SchedulingPolicy

from loraplex_bench.policies.figures import Figure
from loraplex_bench.policies.runs import replay, slora_adapters, slora_setup

if TYPE_CHECKING:
    from loraplex_engine.simulation.outcomes import Summary

    from loraplex_bench.policies.figures import Report

SECTION: Final = "overload"
SLO_S: Final = 6.0
OVERLOAD_RATE: Final = 6.0
DURATION_S: Final = 300.0
# S-LoRA's table for N = 400: rate -> requests per second, attainment
PUBLISHED: Final = {1: (0.94, 1.0), 2: (1.84, 1.0), 4: (3.54, 1.0), 6: (4.01, 0.10), 8: (4.02, 0.06)}
# cv -> first come first served, last come first served, early abort, all at R = 6
PUBLISHED_BY_CV: Final = {1: (0.101, 0.699, 0.719), 8: (0.136, 0.447, 0.562)}


def run(report: Report) -> None:
    """Reproduce the knee, then compare policies beyond it."""
    for rate, (throughput, attainment) in PUBLISHED.items():
        _knee(report, float(rate), throughput, attainment)
    by_policy: dict[QueuePolicy, list[tuple[float, float]]] = {policy: [] for policy in QueuePolicy}
    for cv in (1, 2, 4, 6, 8):
        for policy in QueuePolicy:
            summary = simulate(policy, OVERLOAD_RATE, cv=cv)
            by_policy[policy].append((float(cv), summary.attainment))
            _attainment(report, policy, cv, summary)
    chart = line_chart(
        "Llama-13B, 400 adapters, 1.5 x the knee: first token within 6 s",
        Axis(label="coefficient of variation of the gaps"),
        Axis(label="share of all requests", low=0.0, high=1.0),
        [
            *(Series(policy.value, points) for policy, points in by_policy.items()),
            *(
                Series(f"S-LoRA {name}", [(float(cv), row[index]) for cv, row in PUBLISHED_BY_CV.items()], True)
                for index, name in ((0, "fcfs"), (2, "early abort"))
            ),
        ],
    )
    report.plot("policies-overload.svg", chart)


def simulate(policy: QueuePolicy, rate: float, *, cv: float = 1.0) -> Summary:
    """Replay S-LoRA's trace under one policy."""
    setup = slora_setup().with_limits(policy=SchedulingPolicy(queue_policy=policy, ttft_slo_s=SLO_S))
    params = SloraParams(num_adapters=400, rate=rate, cv=cv, duration_s=DURATION_S)
    return replay(setup, slora_adapters(), slora_trace(params), slo_ttft_s=SLO_S).summary


def _knee(report: Report, rate: float, throughput: float, attainment: float) -> None:
    """Show that the cost model puts the knee where S-LoRA's table has it."""
    summary = simulate(QueuePolicy.FCFS, rate)
    case = f"fcfs, R={rate:g}, cv 1"
    near = {"at_least": 0.95 * throughput, "at_most": 1.05 * throughput}
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="req_per_s",
            value=summary.requests_per_s,
            unit="req/s",
            peer="S-LoRA's table",
            peer_value=throughput,
            **near,
        )
    )
    bound = {"at_least": 0.99} if attainment == 1.0 else {"at_most": 0.15}
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="attainment",
            value=summary.attainment,
            unit="share",
            peer="S-LoRA's table",
            peer_value=attainment,
            **bound,
        )
    )


def _attainment(report: Report, policy: QueuePolicy, cv: int, summary: Summary) -> None:
    published = dict(zip(QueuePolicy, (0, 2, 1), strict=True))[policy]
    peer_value = PUBLISHED_BY_CV[cv][published] if cv in PUBLISHED_BY_CV else None
    is_bound = policy is QueuePolicy.SLO_ABORT and cv == 1
    report.add(
        Figure(
            section=SECTION,
            case=f"{policy.value}, R={OVERLOAD_RATE:g}, cv {cv}",
            metric="attainment",
            value=summary.attainment,
            unit="share",
            at_least=0.70 if is_bound else None,
            peer="S-LoRA's table" if peer_value is not None else "",
            peer_value=peer_value,
        )
    )
    report.add(
        Figure(
            section=SECTION,
            case=f"{policy.value}, R={OVERLOAD_RATE:g}, cv {cv}",
            metric="ttft_mean_s",
            value=summary.ttft_mean_s,
            unit="s",
        )
    )
