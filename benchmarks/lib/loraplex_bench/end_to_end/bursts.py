"""Bursts: requests all at once, output tokens per second."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex_client.workload import burst

from loraplex_bench.end_to_end.context import SUITE
from loraplex_bench.floors import burst_floor_s
from loraplex_bench.peers import NOBODY, VLLM, Peer, best_end_to_end
from loraplex_bench.results import Row

if TYPE_CHECKING:
    from loraplex_client.workload import Trace

    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import Rig, RigSetup

STANDARD_REQUESTS: Final = 512
HOST_TIMES: Final = ("schedule_s", "launch_s", "wait_s", "update_s")
BURST_OF_BASELINES: Final = "burst 512 x 256+128"


@dataclass(frozen=True, kw_only=True)
class BurstSize:
    """Requests of a burst and their lengths."""

    num_requests: int = STANDARD_REQUESTS
    prompt_tokens: int = 256
    output_tokens: int = 128

    def trace(self, num_adapters: int) -> Trace:
        """Return the burst over that many adapters."""
        return burst(
            num_adapters, self.num_requests, prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens
        )


def warm_up(bench: Bench, rig: Rig, size: BurstSize) -> None:
    """Run requests without and with adapters, then leave no adapter on the device."""
    few = replace(size, num_requests=max(2, size.num_requests // 8))
    bench.replay(rig, few.trace(0)).require_complete()
    setup = rig.setup
    if setup.num_adapters and setup.limits.max_resident_adapters:
        bench.replay(rig, few.trace(min(8, setup.num_adapters))).require_complete()
    rig.evict_all()


def peer_of(setup: RigSetup, size: BurstSize, num_adapters: int) -> Peer:
    """Return vLLM's best tokens per second on the same burst."""
    if size != BurstSize():
        return NOBODY
    return best_end_to_end(setup.shape, setup.family, BURST_OF_BASELINES, num_adapters, "out_tok_per_s")


def case_name(setup: RigSetup, workload: str, label: str = "") -> str:
    """Return a row's case."""
    return "/".join(part for part in (setup.shape.name, setup.family.name, workload, label) if part)


def run_bursts(
    bench: Bench, setup: RigSetup, counts: tuple[int, ...], *, size: BurstSize, label: str = ""
) -> dict[int, float]:
    """Measure bursts over several numbers of adapters, all of them in the arena and none on the device at t = 0.

    Returns:
        Adapters -> output tokens per second (median of the bench's repeats).
    """
    rig = bench.rig(setup)
    warm_up(bench, rig, size)
    rates: dict[int, float] = {}
    for num_adapters in counts:
        measured = [_one_burst(bench, rig, size.trace(num_adapters)) for _ in range(bench.repeats)]
        rates[num_adapters] = statistics.median(measured)
        trace = size.trace(num_adapters)
        floor_s = burst_floor_s(setup.shape, setup.family, trace, setup.limits.max_num_seqs)
        peer = peer_of(setup, size, num_adapters)
        case = case_name(setup, f"burst:{num_adapters}:{size.num_requests}", label)
        bench.add(
            Row(
                suite=SUITE,
                case=case,
                metric="out_tok_per_s",
                value=rates[num_adapters],
                unit="tok/s",
                floor=float(trace.output_tokens.sum()) / floor_s,
                peer=peer.name,
                peer_value=peer.value,
            )
        )
        if 0 in rates and num_adapters:
            _add_share(bench, setup, size, case, rates[num_adapters] / rates[0], num_adapters)
    return rates


def _one_burst(bench: Bench, rig: Rig, trace: Trace) -> float:
    rig.evict_all()
    resident, before = rig.num_resident, replace(rig.engine.totals)
    measured = bench.replay(rig, trace)
    measured.require_complete()
    after = rig.engine.totals
    spent = {name: getattr(after, name) - getattr(before, name) for name in ("num_steps", *HOST_TIMES)}
    host = ", ".join(f"{name[:-2]} {spent[name]:.2f} s" for name in HOST_TIMES)
    bench.results.note(
        f"burst of {len(trace)} over {trace.num_adapters} adapters, {resident} on the device at t = 0, "
        f"{rig.num_resident} at the end: {measured.wall_s:.2f} s, {spent['num_steps']} steps; loop: {host}; "
        f"{rig.engine.counters.num_preemptions} preemptions since the start"
    )
    return measured.output_tokens_per_s


def _add_share(bench: Bench, setup: RigSetup, size: BurstSize, case: str, share: float, num_adapters: int) -> None:
    base, peer = peer_of(setup, size, 0), peer_of(setup, size, num_adapters)
    peer_share = peer.value / base.value if peer.value and base.value else None
    bench.add(
        Row(
            suite=SUITE,
            case=case,
            metric="share_of_base",
            value=share,
            unit="share",
            peer=f"{VLLM}, of its own base" if peer_share else "",
            peer_value=peer_share,
        )
    )


def run_registered(bench: Bench, setup: RigSetup, *, few: int, size: BurstSize) -> None:
    """Compare a burst over all registered adapters, most of which are loaded during it, with one over a few."""
    rates = run_bursts(bench, setup, (few, setup.num_adapters), size=size, label=f"{setup.num_adapters} registered")
    bench.add(
        Row(
            suite=SUITE,
            case=case_name(setup, f"burst:{setup.num_adapters}:{size.num_requests}", "registered"),
            metric=f"share_of_{few}",
            value=rates[setup.num_adapters] / rates[few],
            unit="share",
        )
    )
