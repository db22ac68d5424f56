"""Overload in the real engine, at the scale of a CPU: torch backend, a small random model, real time.

A flood tells about how much to offer. The capacity that counts is measured during the overload itself, since the machine may
do other things meanwhile: requests finished over the time in which the step loop was busy, so an engine that turns requests
away and idles gains nothing. That its batch was full is a figure of its own.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_client.workload import Measured, SloraParams, Trace, slora_trace
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits, QueuePolicy, SchedulingPolicy
from support.base_models import TinyBase, write_base_model

from loraplex_bench.end_to_end.replay import Replay
from loraplex_bench.policies.figures import Figure
from loraplex_bench.rig import Rig, RigSetup
from loraplex_bench.shapes import AdapterFamily, Shape

if TYPE_CHECKING:
    from loraplex_bench.policies.figures import Report

SECTION: Final = "real"
OVERLOAD: Final = 1.5
SLO_S: Final = 2.0
DURATION_S: Final = 60.0
NUM_ADAPTERS: Final = 40
LENGTHS: Final = (16, 96)
FLOOD_REQUESTS: Final = 200
SHARE: Final = 0.95
MODEL: Final = TinyBase(num_layers=4, hidden_size=256, intermediate_size=512, num_heads=8, head_dim=32)


def make_setup(model_dir: Path, policy: SchedulingPolicy) -> RigSetup:
    """Return an engine of eight sequences over forty adapters of which a dozen fit beside them."""
    info = load_base_model(model_dir, name="small")
    shape = Shape(info=info, pool_gib=0.0, dtype="float32", model_dir=model_dir)
    family = AdapterFamily(ranks=(8, 16))
    pages = 8 * shape.pool.num_blocks(2 * LENGTHS[1]) + family.total_pages(shape, 12)
    limits = EngineLimits(
        pool=shape.pool,
        num_pages=pages,
        max_model_len=2 * LENGTHS[1],
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_resident_adapters=256,
        policy=policy,
    )
    return RigSetup(shape=shape, family=family, num_adapters=NUM_ADAPTERS, limits=limits)


def make_trace(rate: float, num_requests: int) -> Trace:
    """Return S-LoRA's arrivals with short lengths."""
    return slora_trace(
        SloraParams(
            num_adapters=NUM_ADAPTERS,
            rate=rate,
            duration_s=num_requests / rate,
            prompt_range=LENGTHS,
            output_range=LENGTHS,
        )
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One replay on a fresh engine.

    Attributes:
        busy_s: Time that the step loop spent on steps.
        rows: Mean sequences of a step.
    """

    measured: Measured
    busy_s: float
    rows: float

    @property
    def capacity(self) -> float:
        """Requests finished per second of work."""
        return float(self.measured.is_finished.sum()) / self.busy_s


def run(report: Report) -> None:
    """Find the capacity, then overload the engine under both policies."""
    abort = SchedulingPolicy(queue_policy=QueuePolicy.SLO_ABORT, ttft_slo_s=SLO_S)
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(write_base_model(Path(folder) / "small", MODEL), SchedulingPolicy())
        floods = [_replay(setup, make_trace(10_000.0, FLOOD_REQUESTS), workload=round_) for round_ in (1, 2)]
        for flood in floods:
            flood.measured.require_complete()
        offered = OVERLOAD * max(flood.capacity for flood in floods)
        trace = make_trace(offered, int(offered * DURATION_S))
        ours = _replay(setup.with_limits(policy=abort), trace, workload=3)
        fcfs = _replay(setup, trace, workload=4)
    report.note(
        f"floods: {floods[0].capacity:.1f} and {floods[1].capacity:.1f} requests/s; offered {offered:.1f} for "
        f"{DURATION_S:.0f} s, capacity meanwhile {ours.capacity:.1f}, objective {SLO_S:g} s; "
        f"{len(ours.measured.failures)} of {len(trace)} ended early"
    )
    _report_figures(report, offered, ours, fcfs, setup.limits.max_num_seqs)


def _report_figures(report: Report, offered: float, ours: Run, fcfs: Run, max_num_seqs: int) -> None:
    case = f"torch on a CPU, {offered / ours.capacity:.2f} x capacity, early abort"
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="attainment",
            value=ours.measured.first_token_share(SLO_S),
            unit="share",
            at_least=SHARE * min(1.0, ours.capacity / offered),
            peer="first come, first served",
            peer_value=fcfs.measured.first_token_share(SLO_S),
        )
    )
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric="sequences per step",
            value=ours.rows,
            unit="of 8",
            at_least=0.85 * max_num_seqs,
            peer="first come, first served",
            peer_value=fcfs.rows,
        )
    )


def _replay(setup: RigSetup, trace: Trace, *, workload: int) -> Run:
    with Rig(setup, None) as rig:
        measured = Replay(rig, trace, workload=workload, cutoff_s=6 * DURATION_S).run()
        totals = rig.engine.totals
        busy_s = totals.schedule_s + totals.launch_s + totals.wait_s + totals.update_s
        return Run(measured, busy_s, float(measured.num_tokens.sum()) / totals.num_steps)
