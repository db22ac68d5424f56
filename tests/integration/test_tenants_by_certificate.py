"""Whose a client certificate is says the same over HTTP as over gRPC."""

from __future__ import annotations

import ipaddress
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import httpx
import pytest
from cryptography import x509
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from support.certificates import TestAuthority
from support.gateway_rig import MODEL_NAME, running_gateway, text_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.certificates import Issued
    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration
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
def authority(tmp_path: Path) -> TestAuthority:
    return TestAuthority(tmp_path)


@asynccontextmanager
async def mutual_tls(valkey_url: str, authority: TestAuthority, keys: Path | None) -> AsyncIterator[Rig]:
    own, mine = authority.issue("server"), authority.issue("rig")
    options = {"tls_ca": authority.ca, "tls_cert": mine.cert, "tls_key": mine.key}
    async with running_gateway(
        valkey_url,
        tls_cert=own.cert,
        tls_key=own.key,
        tls_client_ca=authority.ca,
        api_keys_file=keys,
        channel_options=options,
    ) as rig:
        yield rig


async def both_ways(
    rig: Rig, ca: Path, certificate: Issued, *, adapter: str = "secret", key: str | None = None
) -> tuple[int, str]:
    """Ask for an adapter with a certificate over both ports; return HTTP's status and gRPC's."""
    trust = ssl.create_default_context(cafile=ca)
    trust.load_cert_chain(certificate.cert, certificate.key)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(verify=trust, base_url=rig.http.replace("http:", "https:"), headers=headers) as http:
        body = {"model": adapter, "prompt": "the quick", "max_tokens": 1}
        status = (await http.post("/v1/completions", json=body)).status_code
    target = f"127.0.0.1:{rig.app.grpc_port}"
    async with open_channel(
        target, tls_ca=ca, tls_cert=certificate.cert, tls_key=certificate.key, api_key=key
    ) as channel:
        stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
        try:
            request = gateway_pb2.GenerateOnceRequest(request=text_request(adapter=adapter))
            await stub.GenerateOnce(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            return status, error.code().name
    return status, "OK"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("node-1", [x509.DNSName("localhost")]),
        ("other", [x509.DNSName("localhost"), x509.UniformResourceIdentifier(SPIFFE)]),
        ("other", [x509.IPAddress(ipaddress.ip_address("192.0.2.7"))]),
        ("other", [x509.IPAddress(ipaddress.ip_address("2001:db8::7"))]),
        ("other", [x509.DNSName("vip.corp"), x509.RFC822Name("ops@vip.corp")]),
    ],
)
async def test_a_certificate_is_its_tenant_on_both_ports(
    valkey_url: str, tmp_path: Path, authority: TestAuthority, name: str, names: list[x509.GeneralName]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    certificate = authority.issue(name, names=names)

    async with mutual_tls(valkey_url, authority, keys) as rig:
        assert await both_ways(rig, authority.ca, certificate) == (200, "OK")
        assert [submit.fairness_key for submit in rig.engine.submits] == ["vip", "vip"]
        # What it says itself goes first, and a wrong key is not excused by the certificate.
        assert await both_ways(rig, authority.ca, certificate, key="key-me") == (404, "NOT_FOUND")
        assert await both_ways(rig, authority.ca, certificate, key="guess") == (401, "UNAUTHENTICATED")


async def test_a_certificate_that_no_line_names_is_no_credential(
    valkey_url: str, tmp_path: Path, authority: TestAuthority
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)

    async with mutual_tls(valkey_url, authority, keys) as rig:
        stranger = authority.issue("stranger", names=[x509.DNSName(SPIFFE.removeprefix("spiffe://"))])
        assert await both_ways(rig, authority.ca, stranger) == (401, "UNAUTHENTICATED")


async def test_without_keys_a_callers_common_name_is_its_tenant_on_both_ports(
    valkey_url: str, authority: TestAuthority
) -> None:
    async with mutual_tls(valkey_url, authority, None) as rig:
        vip, other = authority.issue("vip"), authority.issue("other")

        assert await both_ways(rig, authority.ca, vip) == (200, "OK")
        assert await both_ways(rig, authority.ca, other) == (404, "NOT_FOUND")
        assert await both_ways(rig, authority.ca, other, adapter=MODEL_NAME) == (200, "NOT_FOUND")
        assert [submit.fairness_key for submit in rig.engine.submits] == ["vip", "vip", "other"]
