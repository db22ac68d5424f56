"""The command that containers ask for a server's health."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_client.credentials.folder import CredentialsFolder, Plan
from loraplex_common import healthcheck
from loraplex_common.grpc_server import GrpcServer, ServerConfig

if TYPE_CHECKING:
    from pathlib import Path


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


async def test_a_server_that_asks_for_certificates_is_shown_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CredentialsFolder(tmp_path).make(Plan())
    own = tmp_path / "engine"
    files = {"tls_ca": own / "ca.crt", "tls_cert": own / "tls.crt", "tls_key": own / "tls.key"}
    server = GrpcServer(
        ServerConfig(tls_cert=files["tls_cert"], tls_key=files["tls_key"], tls_client_ca=files["tls_ca"])
    )
    target = f"127.0.0.1:{await server.start()}"
    server.set_ready(True)

    async def ask(*flags: str) -> object:
        monkeypatch.setattr(sys, "argv", ["healthcheck", target, *flags])
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(healthcheck.main)
        return ended.value.code

    shown = [word for name, file in files.items() for word in (f"--{name.replace('_', '-')}", str(file))]
    assert await ask(*shown) is None
    assert await ask(*shown, "--tls-name", "engine.loraplex.internal") is None
    assert "UNAVAILABLE" in str(await ask(*shown, "--tls-name", "gateway.loraplex.internal"))
    assert "UNAVAILABLE" in str(await ask(*shown[:2]))
    assert await ask("--tls-cert", "c") == 2
    assert "No such file" in str(await ask("--tls-ca", str(tmp_path / "none")))
    await server.drain(settle_s=0, grace_s=0)
