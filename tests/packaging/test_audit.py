"""The audit of a release: it fails for what it learns, and says by name when it could not ask."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dist() -> ModuleType:
    """deploy/dist.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("dist", ROOT / "deploy" / "dist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, out: str, err: str, code: int) -> None:
    """Have a program with pip-audit's outcome stand where the interpreter is."""
    (tmp_path / "out").write_text(out)
    (tmp_path / "err").write_text(err)
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat {tmp_path / 'out'}\ncat {tmp_path / 'err'} >&2\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_known_vulnerability_fails_by_name(dist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [
        {"name": "grpcio", "version": "1.0", "vulns": [{"id": "PYSEC-1"}]},
        {"name": "numpy", "version": "2", "vulns": []},
    ]
    answer(monkeypatch, tmp_path, out=json.dumps({"dependencies": found}), err="", code=1)

    with pytest.raises(dist.DistError, match=r"grpcio 1\.0: PYSEC-1"):
        dist.audit()


def test_advisories_that_cannot_be_reached_are_said_and_do_not_fail(
    dist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer(monkeypatch, tmp_path, out="", err="requests.exceptions.ConnectionError: no route\n", code=1)

    assert dist.audit().startswith(f"NOT AUDITED: {len(dist.locked_names())} packages of serve.txt")


def test_an_audit_that_fails_otherwise_fails(dist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, tmp_path, out="", err="usage: pip-audit\nno such option\n", code=2)

    with pytest.raises(dist.DistError, match="no such option"):
        dist.audit()


def test_a_clean_audit_says_how_much_it_asked_about(
    dist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer(
        monkeypatch,
        tmp_path,
        out=json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}),
        err="",
        code=0,
    )

    assert dist.audit() == "audited 1 packages of serve.txt: no known vulnerability"
