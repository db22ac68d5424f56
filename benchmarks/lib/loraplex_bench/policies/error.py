"""The simulator against the real engine: throughput and attainment that were measured, and what it says of the same work.

Calibrated on single steps of Llama-2-7B (``benchmarks/calibrate.py``, else those of ``profile_step.py``), tested on bursts of
other shapes and on open-loop traces (``benchmarks/engine.py bursts-8b rates-8b-below rates-8b-beyond``). Measurements are committed
files of benchmarks/results: of every workload the newest, of whichever commit, as not all are repeated each time; a note names
the commits. Where there are none, the row says so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_client.workload import from_spec
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.calibration import fit
from loraplex_engine.simulation.devices import GIB, H100_PRIORS
from loraplex_engine.simulation.measured import SUITES, TARGETS, measured_steps
from loraplex_engine.simulation.setup import SimulationSetup, gpu_limits
from loraplex_engine.simulation.shapes import ModelShape, base_model
from loraplex_engine.simulation.step_cost import StepCost, StepRates

from loraplex_bench.paths import ROOT
from loraplex_bench.policies.figures import Figure
from loraplex_bench.policies.runs import replay
from loraplex_bench.rig import COMPARABLE

if TYPE_CHECKING:
    from loraplex_client.workload import Trace

    from loraplex_bench.policies.figures import Report

SECTION: Final = "error"
RESULTS: Final = ROOT / "benchmarks" / "results"
CALIBRATED_ON: Final = "llama2-7b"
TESTED_ON: Final = "llama3-8b"
POOL_GIB: Final = {"llama2-7b": 57.0, "llama3-8b": 52.0}
MAX_ERROR: Final = 0.10
# e.g. llama3-8b/all r16/slora:200:1:20:1:30/rates
_CASE: Final = re.compile(
    r"(?P<shape>[^/]+)/(?P<targets>qkvo|all) r(?P<ranks>\d+([/+]\d+)*)/(?P<spec>(burst|slora|rate):[\d.:]+)(/rates)?"
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A workload that the real engine ran.

    Attributes:
        commit: Commit of the engine.
        figures: Metric -> value.
    """

    case: str
    commit: str
    shape: str
    targets: str
    ranks: tuple[int, ...]
    spec: str
    figures: dict[str, float]


def read_results() -> list[dict[str, Any]]:
    """Return the engine's result files of one H100, the oldest first; other benchmarks' files have no such head."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [
        document
        for document in documents
        if "meta" in document
        and "H100" in str(document["meta"].get("gpu", ""))
        and document["rows"]
        and "suite" in document["rows"][0]
    ]


def calibration() -> tuple[StepRates, str] | None:
    """Fit the newest commit's steps of the calibration's model; return the rates and the commit."""
    by_commit: dict[str, list[dict[str, Any]]] = {}
    for document in read_results():
        rows = [
            row
            for row in document["rows"]
            if row["suite"] in SUITES
            and row["metric"] in ("step", "host")
            and row["case"].startswith(f"{CALIBRATED_ON}/")
        ]
        if rows:
            commit = document["meta"]["commit"]
            by_commit[commit] = by_commit.pop(commit, []) + rows
    if not by_commit:
        return None
    commit, rows = list(by_commit.items())[-1]
    return fit(measured_steps(rows), H100_PRIORS), commit


def measurements() -> list[Measurement]:
    """Return the workloads that the engine ran on the model it is tested on, of each the newest run."""
    found: dict[str, Measurement] = {}
    for document in read_results():
        of_run: dict[str, Measurement] = {}
        for row in document["rows"]:
            match = _CASE.fullmatch(row["case"])
            if row["suite"] != "end_to_end" or match is None or match["shape"] != TESTED_ON:
                continue
            ranks = tuple(int(rank) for rank in re.split("[/+]", match["ranks"]))
            one = of_run.setdefault(
                row["case"],
                Measurement(
                    row["case"],
                    document["meta"]["commit"],
                    match["shape"],
                    match["targets"],
                    ranks,
                    match["spec"],
                    {},
                ),
            )
            one.figures[row["metric"]] = float(row["value"])
        found |= of_run
    return list(found.values())


def run(report: Report) -> None:
    """Compare every measured workload."""
    calibrated = calibration()
    throughput: list[float] = []
    attainment: list[float] = []
    if calibrated is not None:
        rates, commit = calibrated
        report.note(f"calibrated on {CALIBRATED_ON}'s steps of commit {commit}")
        measured = measurements()
        for tested in dict.fromkeys(one.commit for one in measured):
            cases = ", ".join(one.case for one in measured if one.commit == tested)
            report.note(f"tested on {cases} of commit {tested}")
        for one in measured:
            _compare(report, one, rates, throughput, attainment)
    _worst(report, "throughput", throughput, "bursts and traces")
    _worst(report, "attainment", attainment, "engine.py rates-8b-below rates-8b-beyond")


def _compare(
    report: Report, one: Measurement, rates: StepRates, throughput: list[float], attainment: list[float]
) -> None:
    trace = from_spec(one.spec)
    slos = sorted(float(name[9:-1]) for name in one.figures if re.fullmatch(r"attained_[\d.]+s", name))
    summaries = {slo_s: _predict(one, trace, rates, slo_s) for slo_s in slos or [6.0]}
    predicted, _ = summaries[min(summaries)]
    measured = one.figures["out_tok_per_s"]
    throughput.append(predicted / measured - 1)
    _row(report, one.case, "out_tok_per_s", predicted, "tok/s", measured)
    for slo_s in slos:
        value, truth = summaries[slo_s][1], one.figures[f"attained_{slo_s:g}s"]
        attainment.append(value - truth)
        _row(report, one.case, f"attained_{slo_s:g}s", value, "share", truth)


def _predict(one: Measurement, trace: Trace, rates: StepRates, slo_s: float) -> tuple[float, float]:
    """Return simulated output tokens per second and attainment."""
    shape = ModelShape(base_model(one.shape))
    num_adapters = max(200, int(trace.adapter.max()) + 1)
    adapters = Adapters(shape, num_adapters, one.ranks, TARGETS[one.targets])
    limits = gpu_limits(
        shape,
        pool_bytes=int(POOL_GIB[one.shape] * GIB),
        arena_bytes=(int(adapters.num_pages.sum()) + 2) * shape.pool.page_bytes,
        max_model_len=1280,
    )
    setup = SimulationSetup(limits=limits, cost=StepCost(shape, rates))
    setup = setup.with_limits(max_resident_adapters=256, policy=COMPARABLE)  # as the engine was measured
    summary = replay(setup, adapters, trace, slo_ttft_s=slo_s).summary
    return summary.output_tokens_per_s, summary.attainment


def _row(report: Report, case: str, metric: str, predicted: float, unit: str, measured: float) -> None:
    report.add(
        Figure(
            section=SECTION,
            case=case,
            metric=metric,
            value=predicted,
            unit=unit,
            peer="measured on one H100",
            peer_value=measured,
        )
    )


def _worst(report: Report, name: str, found: list[float], needed: str) -> None:
    """Bound the largest error, relative for throughput and in points for attainment."""
    if not found:
        report.note(f"{name} error: not measured; needs {needed}")
    report.add(
        Figure(
            section=SECTION,
            case=f"largest {name} error over {len(found)} workloads",
            metric="error",
            value=float(np.abs(found).max()) if found else float("nan"),
            unit="share" if name == "attainment" else "relative",
            at_most=MAX_ERROR,
        )
    )
