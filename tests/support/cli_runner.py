"""Runs ``loraplex ARGUMENTS`` in this process, against doubles of the servers; as pytest fixtures."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from loraplex_client.cli import main
from support.fleet_double import FleetDouble
from support.gateway_double import GatewayDouble, StoreDouble, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    code: int
    out: str
    err: str


class Runner:
    """Runs ``loraplex ARGUMENTS`` in this process."""

    def __init__(self, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.setenv("LORAPLEX_TARGET", target)
        monkeypatch.setenv("LORAPLEX_STORE_TARGET", target)
        monkeypatch.setenv("COLUMNS", "160")

    def __call__(self, *arguments: str, stdin: str = "") -> Result:
        self._monkeypatch.setattr(sys, "argv", ["loraplex", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        else:
            code = 0
        captured = self._capsys.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)


@pytest.fixture
def gateway() -> GatewayDouble:
    return GatewayDouble()


@pytest.fixture
def store() -> StoreDouble:
    return StoreDouble()


@pytest.fixture
def fleet() -> FleetDouble:
    return FleetDouble()


@pytest.fixture
def loraplex(
    gateway: GatewayDouble,
    store: StoreDouble,
    fleet: FleetDouble,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Runner]:
    with serving(gateway, store, fleet) as target:
        yield Runner(target, monkeypatch, capsys)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path
