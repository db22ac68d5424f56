"""TLS and mutual TLS over a real connection; the certificates are made for the test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex_common.auth import Authenticator, Principal, current_principal
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.rpc_errors import error_from_rpc
from support.certificates import Certificates

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the openssl command to make certificates"
)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def start(config: ServerConfig, authenticator: Authenticator | None = None) -> tuple[GrpcServer, str]:
    async def who(_request: bytes, _context: Any) -> bytes:
        return current_principal().name.encode()

    server = GrpcServer(config, authenticator=authenticator)
    handlers: dict[str, Any] = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.v1.WhoService", handlers)])
    return server, f"localhost:{await server.start()}"


async def ask(target: str, **options: Any) -> str:
    async with open_channel(target, **options) as channel:
        who: Any = channel.unary_unary("/test.v1.WhoService/Who")
        return str((await who(b"", timeout=20)).decode())


async def test_a_tls_server_is_verified_and_keys_work_over_it(certificates: Certificates) -> None:
    cert, key = certificates.issue("server")
    server, target = await start(ServerConfig(tls_cert=cert, tls_key=key), Authenticator({"k": Principal(name="acme")}))

    assert await ask(target, tls_ca=certificates.ca, api_key="k") == "acme"
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(target, api_key="k")  # plain text to a TLS port
    await server.drain(settle_s=0, grace_s=0)


async def test_a_client_certificate_names_the_tenant(certificates: Certificates) -> None:
    cert, key = certificates.issue("server")
    node_cert, node_key = certificates.issue("node-1")
    config = ServerConfig(tls_cert=cert, tls_key=key, tls_client_ca=certificates.ca)
    server, target = await start(config, Authenticator({"cn=node-1": Principal(name="acme")}))
    node = {"tls_ca": certificates.ca, "tls_cert": node_cert, "tls_key": node_key}
    stranger_cert, stranger_key = certificates.issue("stranger")

    assert await ask(target, **node) == "acme"
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await ask(target, tls_ca=certificates.ca, tls_cert=stranger_cert, tls_key=stranger_key)
    with pytest.raises(grpc.aio.AioRpcError) as without:
        await ask(target, tls_ca=certificates.ca)

    assert isinstance(error_from_rpc(unknown.value), UnauthenticatedError)
    assert without.value.code() is grpc.StatusCode.UNAVAILABLE  # refused in the handshake
    await server.drain(settle_s=0, grace_s=0)


@pytest.mark.parametrize("options", [{"tls_cert": Path("c"), "tls_key": Path("k")}, {"tls_cert": Path("c")}])
def test_half_a_client_certificate_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a client certificate needs"):
        open_channel("localhost:1", **options)
