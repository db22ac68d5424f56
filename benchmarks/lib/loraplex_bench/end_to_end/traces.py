"""Open-loop traces: the S-LoRA trace, and more adapters than fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import Measured, SloraParams, Trace, poisson_rate, slora_trace

from loraplex_bench.end_to_end.bursts import BurstSize, case_name, warm_up
from loraplex_bench.end_to_end.context import SUITE
from loraplex_bench.end_to_end.replay import CUTOFF_S
from loraplex_bench.floors import token_floor_s
from loraplex_bench.peers import NOBODY, best_end_to_end
from loraplex_bench.results import Row

if TYPE_CHECKING:
    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import RigSetup

SLO_S: Final = 6.0
LOWEST: Final = frozenset({"ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms", "unfinished"})


def figures(measured: Measured) -> dict[str, tuple[float, str]]:
    """Return metric -> (value, unit), named as the columns of ``end_to_end.csv``."""
    return {
        "slo_attainment_6s": (measured.attainment(SLO_S), "share"),
        "ttft_p50_s": (measured.ttft_percentile(50), "s"),
        "ttft_p99_s": (measured.ttft_percentile(99), "s"),
        "tpot_p50_ms": (measured.tpot_percentile(50) * 1e3, "ms"),
        "tpot_p99_ms": (measured.tpot_percentile(99) * 1e3, "ms"),
        "unfinished": (float(measured.num_unfinished), "requests"),
        "req_per_s": (measured.requests_per_s, "req/s"),
        "out_tok_per_s": (measured.output_tokens_per_s, "tok/s"),
    }


def run_slora(
    bench: Bench, setup: RigSetup, params: SloraParams, *, warm: BurstSize, cutoff_s: float = CUTOFF_S
) -> None:
    """Replay the S-LoRA trace after a warm-up; with no adapters the same requests go to the base model."""
    rig = bench.rig(setup)
    warm_up(bench, rig, warm)
    trace = slora_trace(params)
    bench.results.note(f"S-LoRA trace, {rig.num_resident} adapters on the device at t = 0, cut off at {cutoff_s:.0f} s")
    measured = bench.replay(rig, trace, cutoff_s=cutoff_s)
    workload = f"{params.num_adapters}:{params.alpha:g}:{params.rate:g}:{params.cv:g}:{params.duration_s:g}"
    is_standard = params == replace(SloraParams(), num_adapters=params.num_adapters)
    bench.results.note(
        f"{len(measured.failures)} requests failed {measured.failures[:2]}, {rig.num_resident} adapters on the device at the end"
    )
    for metric, (value, unit) in figures(measured).items():
        peer = NOBODY
        if is_standard:
            named = "slora 200:1:20:1:60"
            peer = best_end_to_end(
                setup.shape, setup.family, named, params.num_adapters, metric, lowest=metric in LOWEST
            )
        floor = {"tpot_p50_ms": token_floor_s(setup.shape) * 1e3, "slo_attainment_6s": 1.0}.get(metric)
        bench.add(
            Row(
                suite=SUITE,
                case=case_name(setup, f"slora:{workload}"),
                metric=metric,
                value=value,
                unit=unit,
                floor=floor,
                peer=peer.name,
                peer_value=peer.value,
            )
        )


def no_cliff_setups(base: RigSetup, *, num_resident: int, kv_tokens: int) -> tuple[RigSetup, RigSetup]:
    """Return the setup in which every adapter fits and the one with room for ``num_resident``, of equal KV pages.

    Args:
        base: Its pool size is replaced; its ``limits.max_num_seqs`` is how many sequences KV has room for.
        num_resident: Adapters that fit the smaller pool.
        kv_tokens: Tokens of one sequence, for which the pool holds keys and values.
    """
    pages = base.limits.max_num_seqs * base.shape.pool.num_blocks(kv_tokens)

    def with_room_for(count: int) -> RigSetup:
        total = pages + base.family.total_pages(base.shape, count)
        return base.with_limits(num_pages=total)

    return with_room_for(base.num_adapters), with_room_for(num_resident)


def run_no_cliff(
    bench: Bench, base: RigSetup, *, num_resident: int, size: BurstSize, duration_s: float, load: float = 0.7
) -> None:
    """Compare a pool that holds all adapters with one that holds a few of them, at the same rate of requests.

    The rate is ``load`` times what the engine finishes of a burst over all adapters while all of them are resident.
    """
    roomy, capped = no_cliff_setups(base, num_resident=num_resident, kv_tokens=size.prompt_tokens + size.output_tokens)
    outcome: list[dict[str, tuple[float, str]]] = []
    trace: Trace | None = None
    for setup, name in ((roomy, "all fit"), (capped, f"{num_resident} fit")):
        rig = bench.rig(setup)
        warm_up(bench, rig, size)
        loading = bench.replay(rig, size.trace(base.num_adapters))  # brings in what fits
        loading.require_complete()
        if trace is None:
            capacity = bench.replay(rig, size.trace(base.num_adapters)).requests_per_s
            trace = poisson_rate(
                base.num_adapters,
                load * capacity,
                duration_s,
                prompt_tokens=size.prompt_tokens,
                output_tokens=size.output_tokens,
            )
            bench.results.note(f"capacity with all adapters resident: {capacity:.2f} req/s; offered {load} of it")
        resident = rig.num_resident
        measured = bench.replay(rig, trace)
        outcome.append(figures(measured))
        bench.results.note(
            f"{name}: {resident} of {base.num_adapters} adapters on the device at t = 0, {rig.num_resident} at the end"
        )
        for metric, (value, unit) in outcome[-1].items():
            bench.add(Row(suite=SUITE, case=case_name(setup, "no-cliff", name), metric=metric, value=value, unit=unit))
    _compare(bench, base, outcome[0], outcome[1])


def _compare(
    bench: Bench, base: RigSetup, roomy: dict[str, tuple[float, str]], capped: dict[str, tuple[float, str]]
) -> None:
    case = case_name(base, "no-cliff")
    throughput = capped["out_tok_per_s"][0] / roomy["out_tok_per_s"][0]
    bench.add(Row(suite=SUITE, case=case, metric="throughput_share", value=throughput, unit="share", floor=1.0))
    waits = np.divide(capped["ttft_p99_s"][0], roomy["ttft_p99_s"][0])
    bench.add(Row(suite=SUITE, case=case, metric="ttft_p99_ratio", value=float(waits), unit="x", floor=1.0))
