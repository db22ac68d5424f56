"""What LoRA costs requests that do not use it: the engine with it beside the engine built without, run in turn."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_bench.end_to_end.bursts import BurstSize, case_name
from loraplex_bench.end_to_end.context import SUITE
from loraplex_bench.results import Row

if TYPE_CHECKING:
    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import Rig, RigSetup


def run_pairs(bench: Bench, enabled: RigSetup, *, size: BurstSize, num_pairs: int = 5) -> None:
    """Burst without adapters on both engines, pair by pair; the order changes within each pair.

    The engine with LoRA has all its adapters on the device, and as many pages more as they take. The other has no
    adapter table, so its runner captured no graph of a LoRA variant and loaded no LoRA kernel. Both share the weights.
    """
    bench.close_rig()
    pages = enabled.family.total_pages(enabled.shape, enabled.num_adapters)
    disabled = replace(
        enabled.with_limits(max_resident_adapters=0, num_pages=enabled.limits.num_pages - pages), num_adapters=0
    )
    with bench.new_rig(disabled) as off, bench.new_rig(enabled) as on:
        bench.replay(on, size.trace(enabled.num_adapters)).require_complete()
        bench.results.note(f"LoRA enabled: {on.num_resident} adapters on the device")
        for rig in (off, on):
            bench.replay(rig, size.trace(0)).require_complete()
        shares, rates = list[float](), list[float]()
        for pair in range(num_pairs):
            order = (off, on) if pair % 2 == 0 else (on, off)
            found = {id(rig): _rate(bench, rig, size) for rig in order}
            shares.append(found[id(on)] / found[id(off)])
            rates.append(found[id(off)])
            bench.results.note(f"pair {pair + 1}: off {found[id(off)]:.0f}, on {found[id(on)]:.0f} tok/s")
    case = case_name(enabled, f"burst:0:{size.num_requests}", "LoRA on against off")
    bench.add(Row(suite=SUITE, case=case, metric="out_tok_per_s_off", value=statistics.median(rates), unit="tok/s"))
    bench.add(
        Row(
            suite=SUITE,
            case=case,
            metric="on_over_off",
            value=statistics.median(shares),
            unit="share",
            floor=1.0,
        )
    )


def _rate(bench: Bench, rig: Rig, size: BurstSize) -> float:
    measured = bench.replay(rig, size.trace(0))
    measured.require_complete()
    return measured.output_tokens_per_s
