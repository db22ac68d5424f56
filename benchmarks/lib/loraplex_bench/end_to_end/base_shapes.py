"""Several base models one after the other: how far each is from its floor, beside the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_bench.end_to_end.bursts import BurstSize, case_name, run_bursts
from loraplex_bench.end_to_end.context import SUITE
from loraplex_bench.floors import burst_floor_s, decode_floor_s
from loraplex_bench.results import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import RigSetup

DECODING: Final = BurstSize(num_requests=64, prompt_tokens=120, output_tokens=128)
"""A burst whose prompts fit one step: each later one decodes all its rows."""


def run_shapes(
    bench: Bench,
    setups: Sequence[RigSetup],
    counts: tuple[int, ...],
    *,
    size: BurstSize,
    decoding: BurstSize = DECODING,
) -> None:
    """Measure bursts and a decode step of several models, and the distance of each to its floor over the first one's.

    Args:
        bench: Takes the rows.
        setups: Engines; all are compared with the first.
        counts: Numbers of adapters of the bursts.
        size: Requests of a burst.
        decoding: Requests of which the decode step is taken.
    """
    reference: dict[str, float] = {}
    for setup in setups:
        distances = _distances(bench, setup, counts, size, decoding)
        for workload, distance in distances.items() if reference else ():
            bench.add(
                Row(
                    suite=SUITE,
                    case=case_name(setup, workload, setup.shape.form),
                    metric=f"of_{setups[0].shape.name}",
                    value=distance / reference[workload],
                    unit="x",
                )
            )
        reference = reference or distances


def _distances(
    bench: Bench, setup: RigSetup, counts: tuple[int, ...], size: BurstSize, decoding: BurstSize
) -> dict[str, float]:
    """Measure one model; returns by workload how many times its floor it takes."""
    rates = run_bursts(bench, setup, counts, size=size, label=setup.shape.form)
    found: dict[str, float] = {}
    for count, rate in rates.items():
        trace = size.trace(count)
        floor_s = burst_floor_s(setup.shape, setup.family, trace, setup.limits.max_num_seqs)
        found[f"burst:{count}:{size.num_requests}"] = float(trace.output_tokens.sum()) / rate / floor_s
    workload = f"decode:0:{decoding.num_requests}"
    measured = bench.replay(bench.rig(setup), decoding.trace(0))
    measured.require_complete()
    step_s = measured.tpot_percentile(50)
    floor_s = decode_floor_s(setup.shape, decoding.num_requests, decoding.prompt_tokens + decoding.output_tokens // 2)
    found[workload] = step_s / floor_s
    case = case_name(setup, workload, setup.shape.form)
    bench.add(Row(suite=SUITE, case=case, metric="step", value=step_s * 1e3, unit="ms", floor=floor_s * 1e3))
    return found
