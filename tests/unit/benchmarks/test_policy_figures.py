"""Figures with bounds: what fails, what counts as measured, and the exit code."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from loraplex_bench.policies import error as policy_error
from loraplex_bench.policies.fairness import Gap, make_trace
from loraplex_bench.policies.figures import Figure, Report
from loraplex_bench.policies.runs import slora_setup

if TYPE_CHECKING:
    from pathlib import Path


def make_figure(value: float, **bounds: float) -> Figure:
    return Figure(section="overload", case="a case", metric="attainment", value=value, unit="share", **bounds)  # type: ignore[arg-type]


def make_report(tmp_path: Path, *figures: Figure) -> Report:
    report = Report(images=tmp_path)
    for figure in figures:
        report.add(figure)
    return report


@pytest.mark.parametrize(
    ("value", "bounds", "holds"),
    [
        (0.7, {"at_least": 0.7}, True),
        (0.69, {"at_least": 0.7}, False),
        (1.3, {"at_most": 1.3}, True),
        (1.31, {"at_most": 1.3}, False),
        (0.9, {"at_least": 0.95, "at_most": 1.05}, False),
        (1.1, {"at_least": 0.95, "at_most": 1.05}, False),
        (math.nan, {"at_most": 1.0}, False),
        (math.nan, {"at_least": 0.0}, False),
        (math.nan, {}, True),
    ],
)
def test_a_figure_holds_within_its_bounds_and_only_if_measured(
    value: float, bounds: dict[str, float], holds: bool
) -> None:
    assert make_figure(value, **bounds).holds is holds


def test_one_figure_that_fails_fails_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = make_figure(1.0, at_least=0.5), make_figure(math.nan, at_most=0.1)

    assert make_report(tmp_path, good).holds
    report = make_report(tmp_path, good, bad)

    assert not report.holds
    assert report.summary.startswith("1 of 2 figures hold, 1 of the others were not measured")
    assert "not measured" in capsys.readouterr().out


def test_a_report_without_bounds_shows_nothing(tmp_path: Path) -> None:
    assert not make_report(tmp_path, make_figure(1.0)).holds
    assert not make_report(tmp_path).holds


def test_rows_keep_the_schema_of_the_other_benchmarks() -> None:
    row = make_figure(0.8, at_least=0.7).row

    assert (row.suite, row.case, row.metric, row.value, row.unit) == (
        "policies",
        "overload/a case",
        "attainment",
        0.8,
        "share",
    )
    assert row.floor == 0.7


def test_errors_are_computed_from_committed_measurements_of_another_model() -> None:
    assert policy_error.calibration() is not None

    found = policy_error.measurements()

    assert found, "no run of the tested model"
    assert all(one.shape == policy_error.TESTED_ON for one in found)
    assert policy_error.CALIBRATED_ON not in {one.shape for one in found}


def test_the_newest_run_of_a_workload_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(commit: str, case: str, **figures: float) -> dict[str, object]:
        rows = [
            {"suite": "end_to_end", "case": case, "metric": name, "value": value} for name, value in figures.items()
        ]
        return {"meta": {"commit": commit}, "rows": rows}

    twice, once = (f"llama3-8b/all r16/slora:200:1:{rate}:1:25/rates" for rate in (48, 14))
    runs = [run("old", twice, out_tok_per_s=1.0, attained_1s=0.5), run("old", once, out_tok_per_s=2.0)]
    monkeypatch.setattr(policy_error, "read_results", lambda: [*runs, run("new", twice, out_tok_per_s=3.0)])

    found = {one.case: (one.commit, one.figures) for one in policy_error.measurements()}

    assert found == {twice: ("new", {"out_tok_per_s": 3.0}), once: ("old", {"out_tok_per_s": 2.0})}


def test_without_measurements_the_error_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_error, "read_results", list)
    report = Report(images=tmp_path)

    policy_error.run(report)

    assert not report.holds
    assert all(not figure.is_measured for figure in report.figures)


def test_tenants_send_the_same_beside_whatever_others() -> None:
    alone, beside = make_trace([1.0], 50.0), make_trace([1.0, 5.0], 50.0)

    own = beside.select(beside.tenant == 0)
    assert own.arrival_s.tolist() == alone.arrival_s.tolist()
    assert own.output_tokens.tolist() == alone.output_tokens.tolist()
    assert set(beside.adapter[beside.tenant == 1].tolist()) <= {4, 5, 6, 7}


def test_slora_s_pool_holds_its_tokens() -> None:
    limits = slora_setup().limits

    assert limits.num_pages * limits.block_tokens == 65_000


def test_the_service_gap_is_the_spread_while_both_wait() -> None:
    gap = Gap()

    for difference in (3.0, -4.0, 10.0):
        gap._differences.append(difference)
    gap._close()

    assert gap.largest == 14.0
