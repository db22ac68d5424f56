"""The same trace at several rates, around an engine's capacity: what the simulator's attainment is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import SloraParams, slora_trace

from loraplex_bench.end_to_end.bursts import BurstSize, case_name, warm_up
from loraplex_bench.end_to_end.context import SUITE
from loraplex_bench.results import Row

if TYPE_CHECKING:
    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import RigSetup

SLOS_S: Final = (0.5, 1.0, 2.0, 6.0)


def run_rates(
    bench: Bench,
    setup: RigSetup,
    rates: tuple[float, ...],
    *,
    duration_s: float,
    warm: BurstSize,
    lengths: tuple[int, int] = (8, 512),
    cutoff_s: float = 120.0,
) -> None:
    """Replay S-LoRA traces over all adapters, each run to its end from a device without adapters."""
    rig = bench.rig(setup)
    warm_up(bench, rig, warm)
    for rate in rates:
        rig.evict_all()
        params = SloraParams(
            num_adapters=setup.num_adapters,
            rate=rate,
            duration_s=duration_s,
            prompt_range=lengths,
            output_range=lengths,
        )
        measured = bench.replay(rig, slora_trace(params), cutoff_s=cutoff_s)
        named = f"slora:{params.num_adapters}:{params.alpha:g}:{rate:g}:{params.cv:g}:{duration_s:g}"
        case = case_name(setup, named, "rates")
        figures = {f"attained_{slo_s:g}s": (measured.first_token_share(slo_s), "share") for slo_s in SLOS_S}
        figures["out_tok_per_s"] = (measured.output_tokens_per_s, "tok/s")
        figures["ttft_p50_s"] = (float(np.median(measured.ttft_s)), "s")
        figures["unfinished"] = (float(measured.num_unfinished), "requests")
        for metric, (value, unit) in figures.items():
            bench.add(Row(suite=SUITE, case=case, metric=metric, value=value, unit=unit))
