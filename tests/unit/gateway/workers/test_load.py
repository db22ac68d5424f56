"""The load of a gateway of several workers, as any of them tells it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import msgspec
from loraplex_gateway.workers import control
from loraplex_gateway.workers.control import ControlServer, load_of_all
from loraplex_gateway.workers.setup import WorkerSetup, control_path
from prometheus_client import CollectorRegistry

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def never(tenant: str, request_id: str) -> bool:
    raise AssertionError("no request is to end")


async def test_a_sibling_that_hangs_or_is_gone_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOAD_TIMEOUT_S", 0.2)
    setup = WorkerSetup(
        gateway_id="own",
        port=0,
        http_port=0,
        metrics_port=0,
        folder=str(tmp_path),
        models=(),
        served_model_name=None,
    )
    alive = msgspec.structs.replace(setup, gateway_id="alive")
    server = ControlServer(alive, CollectorRegistry(), {}, lambda: 5, never)
    await server.start()
    with socket.socket(socket.AF_UNIX) as hanging, socket.socket(socket.AF_UNIX) as gone:
        hanging.bind(str(control_path(str(tmp_path), "hanging")))
        hanging.listen()
        gone.bind(str(control_path(str(tmp_path), "gone")))
        async with asyncio.timeout(10):
            assert await load_of_all(setup, lambda: 2) == 2 + 5
    await server.stop()


async def test_a_gateway_of_one_process_tells_its_own(tmp_path: Path) -> None:
    assert await load_of_all(None, lambda: 3) == 3
