"""The gateway as an operator runs it: a process with a ready line, TLS, and a clean end."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_gateway.config import GatewayConfig
from support.gateway_rig import model_directory, running_gateway, text_request
from support.processes import ServiceProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration
FREE_PORTS = ("--port", "0", "--http-port", "0", "--metrics-port", "0")


def test_a_process_says_where_it_listens_and_ends_well(valkey_url: str, tmp_path: Path) -> None:
    arguments = ["--model", str(model_directory()), "--redis-url", valkey_url, "--drain-settle-s", "0"]
    process = ServiceProcess("loraplex_gateway", [*arguments, *FREE_PORTS], log_dir=tmp_path)
    try:
        process.wait_ready()

        assert {"grpc", "metrics", "http"} <= set(process.addresses)
        assert process.addresses["http"] != process.addresses["metrics"]
        assert "loraplex_gateway_requests_total" in httpx.get(f"http://{process.addresses['metrics']}/metrics").text
        assert httpx.get(f"http://{process.addresses['http']}/health").status_code == 503
    finally:
        code = process.stop()
    assert code == 0
    assert valkey_url not in process.log_path.read_text()


def test_a_missing_model_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loraplex_gateway"]
    command += ["--model", str(tmp_path / "nowhere"), "--redis-url", "redis://127.0.0.1:1", *FREE_PORTS]

    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert result.returncode == 1
    assert f"loraplex-gateway: {tmp_path / 'nowhere'}: no such directory" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ()}, "--model"),
        ({"port": 70000}, "--port"),
        ({"metrics_port": 70000}, "--metrics-port"),
        ({"max_concurrent_requests": 0}, "--max-concurrent-requests"),
        ({"drain_grace_s": -1.0}, "--drain-grace-s"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    settings: dict[str, object] = {"model": (tmp_path,), "redis_url": "redis://x", **changes}
    with pytest.raises(ValueError, match=words):
        GatewayConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of its own for localhost, and its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *curve, *names, *files], check=True, capture_output=True, timeout=60)
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
async def test_tls_holds_on_both_ports(valkey_url: str, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with running_gateway(valkey_url, tls_cert=cert, tls_key=key, channel_options={"tls_ca": cert}) as rig:
        response = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()), timeout=20)
        assert response.finished.usage.output_tokens == 8
        url = rig.http.replace("http://", "https://")
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=cert)) as http:
            assert (await http.get(f"{url}/health")).status_code == 200
        async with open_channel(f"127.0.0.1:{rig.app.grpc_port}") as plain:
            stub = gateway_pb2_grpc.GatewayServiceStub(plain)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=2)
