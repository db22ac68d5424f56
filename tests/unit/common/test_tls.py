"""TLS and mutual TLS over real connections, and certificates that are rotated while they are open."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex_common import tls_files, watched_files
from loraplex_common.auth import Authenticator, Principal, Role, current_principal
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.peers import PeerChannel, PeerIdentity, Peers
from loraplex_common.rpc_errors import error_from_rpc
from structlog.testing import capture_logs
from support.certificates import TestAuthority, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WHO, WATCH = "/test.v1.WhoService/Who", "/test.v1.WhoService/Watch"


@pytest.fixture
def authority(tmp_path: Path) -> TestAuthority:
    return TestAuthority(tmp_path)


@pytest.fixture(autouse=True)
def _every_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY_S", 0.0)


async def start(config: ServerConfig, authenticator: Authenticator | None = None) -> tuple[GrpcServer, str]:
    async def who(_request: bytes, _context: Any) -> bytes:
        return current_principal().name.encode()

    async def watch(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        while True:
            yield b"."
            await asyncio.sleep(0.01)

    rights = {method: frozenset(Role) for method in (WHO, WATCH)}
    server = GrpcServer(config, authenticator=authenticator, rights=rights)
    handlers: dict[str, Any] = {
        "Who": grpc.unary_unary_rpc_method_handler(who),
        "Watch": grpc.unary_stream_rpc_method_handler(watch),
    }
    server.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.v1.WhoService", handlers)])
    return server, f"localhost:{await server.start()}"


async def ask(target: str, **options: Any) -> str:
    async with open_channel(target, **options) as channel:
        who: Any = channel.unary_unary(WHO)
        return str((await who(b"", timeout=20)).decode())


async def ask_peer(channel: PeerChannel) -> str:
    async with channel.use() as opened:
        who: Any = opened.unary_unary(WHO)
        return str((await who(b"", timeout=20)).decode())


async def test_a_tls_server_is_verified_and_keys_work_over_it(authority: TestAuthority) -> None:
    cert = authority.issue("server")
    config = ServerConfig(tls_cert=cert.cert, tls_key=cert.key)
    server, target = await start(config, Authenticator({"k": Principal(name="acme")}))

    assert await ask(target, tls_ca=authority.ca, api_key="k") == "acme"
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(target, api_key="k")  # plain text to a TLS port
    await server.drain(settle_s=0, grace_s=0)


async def test_a_client_certificate_names_the_tenant(authority: TestAuthority) -> None:
    cert, node, stranger = authority.issue("server"), authority.issue("node-1"), authority.issue("stranger")
    config = ServerConfig(tls_cert=cert.cert, tls_key=cert.key, tls_client_ca=authority.ca)
    server, target = await start(config, Authenticator({"cn=node-1": Principal(name="acme")}))

    assert await ask(target, tls_ca=authority.ca, tls_cert=node.cert, tls_key=node.key) == "acme"
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await ask(target, tls_ca=authority.ca, tls_cert=stranger.cert, tls_key=stranger.key)
    with pytest.raises(grpc.aio.AioRpcError) as without:
        await ask(target, tls_ca=authority.ca)

    refusal = error_from_rpc(unknown.value)
    assert isinstance(refusal, UnauthenticatedError)
    assert "cn=stranger" in refusal.message
    assert without.value.code() is grpc.StatusCode.UNAVAILABLE  # refused in the handshake
    await server.drain(settle_s=0, grace_s=0)


@pytest.mark.parametrize("options", [{"tls_cert": Path("c"), "tls_key": Path("k")}, {"tls_cert": Path("c")}])
def test_half_a_client_certificate_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a client certificate needs"):
        open_channel("localhost:1", **options)


async def test_a_certificate_for_another_name_is_refused_unless_that_name_is_expected(authority: TestAuthority) -> None:
    cert = authority.issue("engines.internal")
    server, target = await start(ServerConfig(tls_cert=cert.cert, tls_key=cert.key))
    peers = Peers(PeerIdentity(tls_ca=authority.ca))

    for name, is_served in (("engines.internal", True), ("stores.internal", False)):
        async with peers.open(target, tls_name=name) as channel:
            who: Any = channel.unary_unary(WHO)
            if is_served:
                assert await who(b"", timeout=20) == b"default"
            else:
                with pytest.raises(grpc.aio.AioRpcError):
                    await who(b"", timeout=20)
    await server.drain(settle_s=0, grace_s=0)


async def test_a_rotated_server_certificate_is_shown_to_new_connections_and_ends_no_stream(tmp_path: Path) -> None:
    old, new = TestAuthority(tmp_path / "old"), TestAuthority(tmp_path / "new")
    cert = old.issue("server")
    server, target = await start(ServerConfig(tls_cert=cert.cert, tls_key=cert.key))
    async with open_channel(target, tls_ca=old.ca) as channel:
        watch: Any = channel.unary_stream(WATCH)
        stream = watch(b"")
        await stream.read()

        rotated = new.issue("server")
        write(cert.cert, rotated.cert.read_bytes())
        write(cert.key, rotated.key.read_bytes())

        assert await ask(target, tls_ca=new.ca) == "default"
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(target, tls_ca=old.ca)
        for _ in range(20):
            assert await stream.read() == b"."
        stream.cancel()
    await server.drain(settle_s=0, grace_s=0)


async def test_an_authority_taken_from_the_client_ca_lets_in_no_new_connection(tmp_path: Path) -> None:
    old, new = TestAuthority(tmp_path / "old"), TestAuthority(tmp_path / "new")
    cert, trusted = new.issue("server"), tmp_path / "trusted.pem"
    write(trusted, old.ca.read_bytes() + new.ca.read_bytes())
    server, target = await start(ServerConfig(tls_cert=cert.cert, tls_key=cert.key, tls_client_ca=trusted))
    before, after = old.issue("node"), new.issue("node")
    assert await ask(target, tls_ca=new.ca, tls_cert=before.cert, tls_key=before.key) == "node"

    write(trusted, new.ca.read_bytes())

    assert await ask(target, tls_ca=new.ca, tls_cert=after.cert, tls_key=after.key) == "node"
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(target, tls_ca=new.ca, tls_cert=before.cert, tls_key=before.key)
    await server.drain(settle_s=0, grace_s=0)


async def test_a_broken_new_certificate_is_logged_and_the_old_one_stays_good(authority: TestAuthority) -> None:
    cert = authority.issue("server")
    server, target = await start(ServerConfig(tls_cert=cert.cert, tls_key=cert.key))

    with capture_logs() as logs:
        write(cert.cert, "not a certificate")
        answers = [await ask(target, tls_ca=authority.ca) for _ in range(3)]

    assert answers == ["default"] * 3
    (said,) = [log for log in logs if log["log_level"] == "error"]
    assert str(cert.cert) in said["cause"]
    await server.drain(settle_s=0, grace_s=0)


async def test_a_peer_that_rotates_shows_its_new_certificate_and_keeps_the_old_call(authority: TestAuthority) -> None:
    cert, node = authority.issue("server"), authority.issue("node-1")
    config = ServerConfig(tls_cert=cert.cert, tls_key=cert.key, tls_client_ca=authority.ca)
    lines = {f"cn=node-{number}": Principal(name=f"acme-{number}") for number in (1, 2)}
    server, target = await start(config, Authenticator(lines))
    channel = PeerChannel(Peers(PeerIdentity(tls_ca=authority.ca, tls_cert=node.cert, tls_key=node.key)), target)
    first = await ask_peer(channel)
    async with channel.use() as opened:
        watch: Any = opened.unary_stream(WATCH)
        stream = watch(b"")
        await stream.read()

        second = authority.issue("node-2")
        write(node.key, second.key.read_bytes())
        write(node.cert, second.cert.read_bytes())

        assert (first, await ask_peer(channel)) == ("acme-1", "acme-2")
        assert await stream.read() == b"."
        stream.cancel()
    await channel.close()
    await server.drain(settle_s=0, grace_s=0)


async def test_files_that_do_not_fit_together_are_refused_at_the_start(authority: TestAuthority) -> None:
    cert, other = authority.issue("server"), authority.issue("other")

    with pytest.raises(OSError, match="cannot be used together"):
        tls_files.server_credentials(tls_files.TlsFiles(cert=cert.cert, key=other.key))


def test_files_that_are_being_replaced_are_read_once_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = TestAuthority(tmp_path)
    first, second = authority.issue("node"), authority.issue("other")
    files = tls_files.TlsFiles(cert=first.cert, key=first.key, ca=authority.ca)
    write(first.cert, second.cert.read_bytes())  # half of a rotation: the key is still the old one
    monkeypatch.setattr("time.sleep", lambda _s: write(first.key, second.key.read_bytes()))

    contents = files.contents(ssl.Purpose.SERVER_AUTH)

    assert (contents.cert, contents.key) == (second.cert.read_bytes(), second.key.read_bytes())


def test_files_that_never_fit_are_refused(tmp_path: Path) -> None:
    authority = TestAuthority(tmp_path)
    first, second = authority.issue("node"), authority.issue("other")

    with pytest.raises(OSError, match="cannot be used together"):
        tls_files.TlsFiles(cert=first.cert, key=second.key, ca=authority.ca).contents(ssl.Purpose.SERVER_AUTH)
