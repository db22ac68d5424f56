"""The command that containers ask for a server's health."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_common import healthcheck
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from support.certificates import TestAuthority

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


async def test_a_server_that_wants_certificates_is_asked_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = TestAuthority(tmp_path)
    cert, mine = authority.issue("engine-1"), authority.issue("probe")
    server = GrpcServer(ServerConfig(tls_cert=cert.cert, tls_key=cert.key, tls_client_ca=authority.ca))
    target = f"127.0.0.1:{await server.start()}"
    server.set_ready(True)
    files = {"CA": authority.ca, "CERT": mine.cert, "KEY": mine.key, "NAME": "engine-1"}
    for name, value in files.items():
        monkeypatch.setenv(f"LORAPLEX_HEALTHCHECK_TLS_{name}", str(value))
    monkeypatch.setattr(sys, "argv", ["healthcheck", target])

    with pytest.raises(SystemExit) as ended:
        await asyncio.to_thread(healthcheck.main)
    without = await asyncio.to_thread(healthcheck.check, target, "readiness")
    await server.drain(settle_s=0, grace_s=0)

    assert ended.value.code is None
    assert without is not None
    assert "UNAVAILABLE" in without


def test_no_server_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["healthcheck", "127.0.0.1:1"])

    with pytest.raises(SystemExit) as ended:
        healthcheck.main()

    assert "UNAVAILABLE" in str(ended.value.code)


def test_a_probe_which_runs_every_few_seconds_imports_no_server() -> None:
    program = (
        "import sys, loraplex_common.healthcheck; print(*(n for n in sys.modules if n.startswith('loraplex_common.')))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert "loraplex_common.healthcheck" in done.stdout.split()
    assert {"loraplex_common.grpc_server", "loraplex_common.interceptors"} & set(done.stdout.split()) == set()
