"""Where ``make bench`` writes: never over a committed result."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "cpu_vs_peft.py"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a results folder that has a committed result."""
    spec = importlib.util.spec_from_file_location("cpu_vs_peft_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)  # its dataclasses look there
    spec.loader.exec_module(module)
    (tmp_path / "cpu_vs_peft.json").write_text("committed")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_results_go_to_a_new_file_unless_told(bench: ModuleType, tmp_path: Path) -> None:
    path = bench.write({"rows": []}, None)

    assert path.parent == tmp_path
    assert json.loads(path.read_text()) == {"rows": []}
    assert (tmp_path / "cpu_vs_peft.json").read_text() == "committed"
    assert bench.write({"rows": [1]}, tmp_path / "cpu_vs_peft.json") == tmp_path / "cpu_vs_peft.json"
