"""``loraplex plan``: demands become traces, the search finds the smallest fleet, and the command says what it found."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_client.charts import Axis, Series, line_chart
from loraplex_client.cli import main
from loraplex_client.plan import (
    Demand,
    DemandError,
    PlanError,
    Simulation,
    find_plan,
    make_trace,
    read_lengths,
    read_popularity,
    simulate,
)

if TYPE_CHECKING:
    from pathlib import Path


def make_simulation(attainment: float, **changes: Any) -> Simulation:
    values: dict[str, Any] = {
        name: 0 for name in Simulation.__dataclass_fields__ if name not in ("sizes", "is_measured", "source")
    }
    return Simulation(**{**values, "attainment": attainment, "sizes": {}, "is_measured": True, "source": "", **changes})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loraplex", "plan", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code if isinstance(end.value.code, int) else 0


# --- search ---


def test_engines_of_several_gpus_are_counted_in_gpus() -> None:
    asked: list[int] = []

    def ask(num_engines: int) -> Simulation:
        asked.append(num_engines)
        return make_simulation(1.0 if num_engines >= 3 else 0.5)

    plan, short = (find_plan(ask, attainment=0.99, max_gpus=most, degree=4) for most in (15, 11))

    assert plan.num_gpus == 12
    assert {trial.num_gpus for trial in plan.trials} == {4, 8, 12}
    assert (short.num_gpus, short.trials[-1].num_gpus) == (None, 8)
    assert max(asked) == 3


def test_a_plan_of_several_gpus_an_engine_says_what_each_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ("--model", "llama3-70b", "--adapters", "4", "--rate", "1", "--requests", "20")

    code = run(monkeypatch, *load, "--tensor-parallel", "4", "--max-gpus", "4")

    said = capsys.readouterr().out
    assert code == 0
    assert "4 x h100 meet the objective" in said
    assert "each GPU: 32.9 GiB of weights" in said
    assert "do not serve --tensor-parallel on GPUs yet" in said
    assert "assumed 10 us" in said
    assert run(monkeypatch, *load, "--tensor-parallel", "4", "--max-gpus", "3") == 2
    assert "--max-gpus 3 are fewer than --tensor-parallel 4" in capsys.readouterr().err
    assert run(monkeypatch, *load, "--tensor-parallel", "0") == 2


@given(needed=st.integers(1, 70), max_gpus=st.integers(1, 64), first=st.integers(1, 80))
def test_the_search_finds_the_smallest_fleet(needed: int, max_gpus: int, first: int) -> None:
    asked: list[int] = []

    def ask(num_gpus: int) -> Simulation:
        asked.append(num_gpus)
        return make_simulation(1.0 if num_gpus >= needed else 0.5)

    plan = find_plan(ask, attainment=0.99, max_gpus=max_gpus, first=first)

    assert plan.num_gpus == (needed if needed <= max_gpus else None)
    assert len(asked) == len(set(asked)) <= 14
    assert [trial.num_gpus for trial in plan.trials] == sorted(asked)


# --- demand ---


def test_a_demand_becomes_its_rate_lengths_and_popularity() -> None:
    demand = Demand(num_adapters=50, rate=20.0, prompt=(10, 20), output=(5, 6), num_requests=20000, base_share=0.25)

    trace = make_trace(demand)

    assert len(trace) / trace.arrival_s[-1] == pytest.approx(20.0, rel=0.05)
    assert (trace.prompt_tokens.min(), trace.prompt_tokens.max()) == (10, 19)
    assert (trace.output_tokens == 5).all()
    counts = np.bincount(trace.adapter + 1, minlength=51)
    assert counts[0] / len(trace) == pytest.approx(0.25, abs=0.02)
    assert counts[1] / counts[2] == pytest.approx(2.0, rel=0.15)  # Zipf's law with exponent 1
    np.testing.assert_array_equal(make_trace(demand).arrival_s, trace.arrival_s)


@pytest.mark.parametrize("text", ["0", "5:5", "9:2", "x", "1:2:3", ""])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DemandError, match="--prompt"):
        read_lengths(text, "--prompt")


@pytest.mark.parametrize("text", ["uniform:1", "zipf:0", "zipf:x", "power:-1", "normal", ""])
def test_popularities_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DemandError, match="--popularity"):
        read_popularity(text)


def test_lengths_and_popularities_are_read() -> None:
    assert (read_lengths("7", ""), read_lengths("8:512", "")) == ((7, 8), (8, 512))
    assert [read_popularity(text) for text in ("uniform", "zipf", "zipf:0.9", "power:0.3")] == [
        ("uniform", 1.0),
        ("zipf", 1.0),
        ("zipf", 0.9),
        ("power", 0.3),
    ]


# --- the command ---


def test_the_command_finds_a_fleet_and_draws_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    svg = tmp_path / "plan.svg"

    code = run(monkeypatch, "--adapters", "50", "--rate", "50", "--requests", "300", "--svg", str(svg))

    printed = capsys.readouterr().out
    assert code == 0
    assert "x h100 meet the objective" in printed.replace("\n", " ")
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")


def test_the_command_fails_where_the_largest_fleet_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--rate", "500", "--requests", "300", "--max-gpus", "1", "--slo-ttft", "0.01", "--json")

    code = run(monkeypatch, "--adapters", "50", *options)

    document = json.loads(capsys.readouterr().out)
    assert code == 1
    assert document["num_gpus"] is None
    assert document["trials"][0]["simulation"]["attainment"] < 0.99


def test_a_model_that_fits_no_gpu_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(monkeypatch, "--adapters", "5", "--rate", "1", "--model", "llama3-70b", "--requests", "10")

    assert code == 1
    assert capsys.readouterr().err.startswith("error: llama3-70b takes")


@pytest.mark.parametrize(
    "options",
    [
        ("--prompt", "0"),
        ("--ranks", "a"),
        ("--rate", "0"),
        ("--popularity", "x"),
        ("--model", "/nowhere/config.json"),
        ("--arena-bytes", "much"),
        ("--attainment", "2"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(monkeypatch: pytest.MonkeyPatch, options: tuple[str, str]) -> None:
    defaults = {"--adapters": "5", "--rate": "1"} | {options[0]: options[1]}

    assert run(monkeypatch, *(word for pair in defaults.items() for word in pair)) == 2


def test_a_simulator_that_refuses_says_why() -> None:
    with pytest.raises(PlanError, match="unknown fields: nonsense"):
        simulate({"nonsense": 1})


# --- charts ---


def test_a_chart_holds_its_lines_and_escapes_its_words() -> None:
    text = line_chart(
        "a < b", Axis(label="x", is_log=True), Axis(label="y & z"), [Series("one", [(1.0, 2.0), (4.0, 3.0)])]
    )

    root = ET.fromstring(text)
    words = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert {"a < b", "y & z", "one", "1", "2", "4"} <= set(words)
    assert sum(node.tag.endswith("polyline") for node in root.iter()) == 1


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="no point"):
        line_chart("empty", Axis(label="x"), Axis(label="y"), [Series("none", [(float("nan"), 1.0)])])
