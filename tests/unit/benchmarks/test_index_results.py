"""The index of the result files: complete, and out of date as soon as a file comes."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_bench.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("index_results", ROOT / "benchmarks" / "index_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_result(folder: Path, name: str, **meta: object) -> None:
    (folder / name).write_text(json.dumps({"meta": meta, "rows": []}))


def test_every_result_file_is_in_the_index_and_nothing_else_is() -> None:
    links = {
        line.split("](")[1].partition(")")[0]
        for line in (RESULTS / "README.md").read_text().splitlines()
        if line.startswith("| [")
    }

    assert links == {path.name for path in RESULTS.glob("*.json")}


def test_the_check_fails_from_a_new_file_until_the_index_is_written(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(tmp_path, "engine-20270101-000000.json", date="2027-01-01T00:00:00Z", commit="abc1234", gpu="none")
    outcomes = []
    for options in (["--check"], [], ["--check"]):
        monkeypatch.setattr(sys, "argv", ["index_results.py", "--folder", str(tmp_path), *options])
        outcomes.append(script.main())

    assert outcomes == [1, 0, 0]
    assert "out of date; run: python benchmarks/index_results.py" in capsys.readouterr().err
    assert "| CPU | 2027-01-01 | abc1234 | - | - |" in (tmp_path / "README.md").read_text()


def test_an_entry_leaves_out_where_the_file_was_written_and_shortens_commits(
    script: ModuleType, tmp_path: Path
) -> None:
    command = "python benchmarks/engine.py bursts-7b --out /somewhere --commit head --repeats 3"
    write_result(tmp_path, "engine-1.json", command=command, commit="before " + "0123456789abcdef" * 2 + "01234567")

    entry = script.read_entry(tmp_path / "engine-1.json")

    assert entry.command == "benchmarks/engine.py bursts-7b --repeats 3"
    assert entry.commit == "before 0123456"


def test_a_file_that_no_description_fits_is_refused_with_the_remedy(script: ModuleType, tmp_path: Path) -> None:
    write_result(tmp_path, "novel-1.json")

    with pytest.raises(ValueError, match=r"novel-1\.json: no description for such files; add one to WHAT"):
        script.index_of(tmp_path)


def test_a_document_cites_a_file_by_a_pattern_too(script: ModuleType) -> None:
    assert script.expand("{profile,steps}-7b-2026*.json") == ["profile-7b-2026*.json", "steps-7b-2026*.json"]

    cited = script.cited_in(["steps-llama2-7b-20261126-042220.json", "engine-19700101-000000.json"])

    assert ROOT / "benchmarks" / "policies.md" in cited["steps-llama2-7b-20261126-042220.json"]
    assert cited["engine-19700101-000000.json"] == []
