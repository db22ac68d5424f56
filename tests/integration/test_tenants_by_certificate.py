"""Whose a client certificate is says the same over HTTP as over gRPC."""

from __future__ import annotations

import shutil
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from support.certificates import Certificates
from support.gateway_rig import MODEL_NAME, running_gateway, text_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.gateway_rig import Rig

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make certificates"),
]
SPIFFE = "spiffe://corp/tenant/vip"
KEYS = f"""
key-me me
cn=node-1 vip
san={SPIFFE} vip
san=192.0.2.7 vip
san=2001:db8::7 vip
san=vip.corp vip
cn=scraper prometheus metrics
"""


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@asynccontextmanager
async def mutual_tls(valkey_url: str, certificates: Certificates, keys: Path | None) -> AsyncIterator[Rig]:
    cert, key = certificates.issue("server")
    mine = certificates.issue("rig")
    options = {"tls_ca": certificates.ca, "tls_cert": mine[0], "tls_key": mine[1]}
    async with running_gateway(
        valkey_url,
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=certificates.ca,
        api_keys_file=keys,
        channel_options=options,
    ) as rig:
        yield rig


async def both_ways(
    rig: Rig, ca: Path, certificate: tuple[Path, Path], *, adapter: str = "secret", key: str | None = None
) -> tuple[int, str]:
    """Ask for an adapter with a certificate over both ports; return HTTP's status and gRPC's."""
    trust = ssl.create_default_context(cafile=ca)
    trust.load_cert_chain(*certificate)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(verify=trust, base_url=rig.http.replace("http:", "https:"), headers=headers) as http:
        body = {"model": adapter, "prompt": "the quick", "max_tokens": 1}
        status = (await http.post("/v1/completions", json=body)).status_code
    target = f"127.0.0.1:{rig.app.grpc_port}"
    async with open_channel(target, tls_ca=ca, tls_cert=certificate[0], tls_key=certificate[1], api_key=key) as channel:
        stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
        try:
            request = gateway_pb2.GenerateOnceRequest(request=text_request(adapter=adapter))
            await stub.GenerateOnce(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            return status, error.code().name
    return status, "OK"


@pytest.mark.parametrize(
    ("name", "alternatives"),
    [
        ("node-1", "DNS:localhost"),
        ("other", f"DNS:localhost,URI:{SPIFFE}"),
        ("other", "IP:192.0.2.7"),
        ("other", "IP:2001:db8::7"),
        ("other", "DNS:vip.corp,email:ops@vip.corp"),
    ],
)
async def test_a_certificate_is_its_tenant_on_both_ports(
    valkey_url: str, tmp_path: Path, certificates: Certificates, name: str, alternatives: str
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    certificate = certificates.issue(name, alternatives=alternatives)

    async with mutual_tls(valkey_url, certificates, keys) as rig:
        assert await both_ways(rig, certificates.ca, certificate) == (200, "OK")
        assert [submit.fairness_key for submit in rig.engine.submits] == ["vip", "vip"]
        # What it says itself goes first, and a wrong key is not excused by the certificate.
        assert await both_ways(rig, certificates.ca, certificate, key="key-me") == (404, "NOT_FOUND")
        assert await both_ways(rig, certificates.ca, certificate, key="guess") == (401, "UNAUTHENTICATED")


async def test_a_certificate_that_no_line_names_is_no_credential(
    valkey_url: str, tmp_path: Path, certificates: Certificates
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)

    async with mutual_tls(valkey_url, certificates, keys) as rig:
        stranger = certificates.issue("stranger", alternatives=f"DNS:{SPIFFE.removeprefix('spiffe://')}")
        assert await both_ways(rig, certificates.ca, stranger) == (401, "UNAUTHENTICATED")


async def test_without_keys_a_callers_common_name_is_its_tenant_on_both_ports(
    valkey_url: str, certificates: Certificates
) -> None:
    async with mutual_tls(valkey_url, certificates, None) as rig:
        vip, other = certificates.issue("vip"), certificates.issue("other")

        assert await both_ways(rig, certificates.ca, vip) == (200, "OK")
        assert await both_ways(rig, certificates.ca, other) == (404, "NOT_FOUND")
        assert await both_ways(rig, certificates.ca, other, adapter=MODEL_NAME) == (200, "NOT_FOUND")
        assert [submit.fairness_key for submit in rig.engine.submits] == ["vip", "vip", "other"]
