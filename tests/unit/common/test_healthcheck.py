"""The command that containers ask for a server's health."""

from __future__ import annotations

import asyncio
import sys

import pytest
from loraplex_common import healthcheck
from loraplex_common.grpc_server import GrpcServer, ServerConfig


async def test_a_server_is_healthy_once_it_is_ready() -> None:
    server = GrpcServer(ServerConfig())
    target = f"127.0.0.1:{await server.start()}"

    before = await asyncio.to_thread(healthcheck.check, target, "readiness")
    server.set_ready(True)
    after = await asyncio.to_thread(healthcheck.check, target, "readiness")
    unknown = await asyncio.to_thread(healthcheck.check, target, "no.such.Service")
    await server.drain(settle_s=0, grace_s=0)

    assert before == f"{target}: NOT_SERVING"
    assert after is None
    assert unknown is not None
    assert "NOT_FOUND" in unknown


def test_no_server_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["healthcheck", "127.0.0.1:1"])

    with pytest.raises(SystemExit) as ended:
        healthcheck.main()

    assert "UNAVAILABLE" in str(ended.value.code)
