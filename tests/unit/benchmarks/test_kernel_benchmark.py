"""The kernel benchmark on a CPU: its adapters, its cases and its result file; only the timing needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_bench.paths import ROOT
from loraplex_bench.steps.lora_case import LoraCase

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

CPU = torch.device("cpu")


@pytest.mark.parametrize(("outs", "rank", "ranks"), [("qkv", "16", [16, 16]), ("4096", "mixed", [64, 8])])
def test_the_adapters_of_a_case_are_read_back_from_its_pool(outs: str, rank: str, ranks: list[int]) -> None:
    case = LoraCase(CPU, outs, rank, 2, 1)

    for index, expected in enumerate(ranks):
        matrices = list(case.matrices(index, 0))
        assert [a.shape for a, _ in matrices] == [(expected, 4096)] * len(case.projections)
        assert [b.shape for _, b in matrices] == [(4096, expected)] * len(case.projections)
        assert all(bool(a.any()) and bool(b.any()) for a, b in matrices)
        assert int(case.tables.max_ranks[index].max()) == expected


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_benchmark", ROOT / "benchmarks" / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", CPU)
    monkeypatch.setattr(module, "KernelLibrary", lambda *_args, **_fields: None)
    return module


def test_every_case_of_the_baselines_becomes_a_row_with_its_peer(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    columns = script.SUITES["kernels_decode"][1]
    monkeypatch.setitem(script.SUITES, "kernels_decode", (lambda *_: {"op": 1.5, "shrink": 0.5}, columns))
    arguments = ["kernels.py", "--suites", "kernels_decode", "--variants", "plain", "pdl", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--every", "10", "--out", str(tmp_path)])

    script.main()

    (path,) = tmp_path.glob("kernels-*.json")
    found = json.loads(path.read_text())
    cases = script.read_cases("kernels_decode")[::10]
    assert found["meta"]["commit"] == "abc"
    assert [row["metric"] for row in found["rows"]] == ["op", "shrink"] * len(cases) + ["op:pdl", "shrink:pdl"] * len(
        cases
    )
    for row, case in zip(found["rows"][::2], cases * 2, strict=True):
        assert row["suite"] == "kernels_decode"
        assert row["case"] == "/".join(case[column] for column in columns)
        assert math.isclose(row["floor"], float(case["floor_us"]))
        assert (row["peer"], row["peer_value"]) == (case["best_peer"], float(case["best_us"]))


def test_a_case_that_fails_leaves_what_was_measured_before(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[object] = []

    def measure(case: object, *_rest: object) -> dict[str, float]:
        if measured:
            raise RuntimeError("wrong result")
        measured.append(case)
        return {"op": 1.0}

    monkeypatch.setitem(script.SUITES, "kernels_decode", (measure, script.SUITES["kernels_decode"][1]))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--suites", "kernels_decode", "--out", str(tmp_path)])

    with pytest.raises(RuntimeError, match="wrong result"):
        script.main()

    (path,) = tmp_path.glob("kernels-*.json")
    assert len(json.loads(path.read_text())["rows"]) == 1
