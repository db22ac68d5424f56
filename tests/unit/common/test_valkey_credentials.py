"""Valkey asks for a password and speaks TLS: both are as the files say when a connection is opened."""

from __future__ import annotations

import stat
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_common import watched_files
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.secret import Secret
from loraplex_common.tls_files import TlsFiles
from loraplex_common.valkey import EmbeddedValkey, connect
from loraplex_common.valkey_errors import ValkeyRefusedError
from support.certificates import TestAuthority, write
from support.tls_proxy import tls_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from loraplex_common.valkey import TranslatingClient


@pytest.fixture(autouse=True)
def _every_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey"), max_memory_bytes=2**26) as server:
        yield server


@asynccontextmanager
async def closing(client: TranslatingClient) -> AsyncIterator[TranslatingClient]:
    yield client
    await client.aclose()


async def test_the_embedded_server_lets_nobody_in_without_its_password(server: EmbeddedValkey) -> None:
    async with closing(connect(server.address)) as client:
        with pytest.raises(ValkeyRefusedError, match="Valkey wants a password"):
            await client.ping()
    async with closing(connect(server.address, password=Secret("guess"))) as client:
        with pytest.raises(ValkeyRefusedError, match="refuses user or password"):
            await client.ping()
    async with closing(connect(server.address, password=Secret.from_file(server.password_path))) as client:
        assert await client.ping()


def test_only_this_user_reads_the_password_and_no_command_line_shows_it(server: EmbeddedValkey) -> None:
    password = server.password_path.read_text().strip()

    assert len(password) == 64
    assert stat.S_IMODE(server.password_path.stat().st_mode) == 0o600
    assert password not in server.address
    assert password not in command_lines()
    assert password not in server.log_path.read_text()


def command_lines() -> str:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                found.append((process / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:  # it has ended
                continue
    assert any("valkey-server" in line for line in found), "whatever is not seen proves nothing"
    return "\n".join(found)


async def test_two_servers_do_not_share_a_password(tmp_path: Path, server: EmbeddedValkey) -> None:
    other = EmbeddedValkey(tmp_path / "other")

    assert other.url.partition("@")[0] != server.url.partition("@")[0]


async def test_a_changed_password_file_counts_from_the_next_connection_on(
    tmp_path: Path, server: EmbeddedValkey
) -> None:
    file = tmp_path / "password"
    write(file, server.password_path.read_text())
    async with closing(connect(server.url)) as admin:
        await admin.acl_setuser("app", enabled=True, passwords=["+first"], commands=["+@all"], keys=["*"])
        write(file, "first\n")
        url = server.address.replace("unix://", "unix://app@")
        async with closing(connect(url, password=Secret.from_file(file))) as client:
            assert await client.ping()
            await admin.acl_setuser("app", enabled=True, passwords=["-first", "+second"])
            await admin.execute_command("CLIENT", "KILL", "USER", "app")
            with pytest.raises(ValkeyRefusedError, match="refuses user or password"):
                await client.ping()

            write(file, "second\n")

            assert await client.ping()


def files(authority: TestAuthority, **changes: Path) -> TlsFiles:
    return TlsFiles(**{"ca": authority.ca, **changes})


async def test_valkey_over_tls_is_verified_and_shown_a_certificate(tmp_path: Path, server: EmbeddedValkey) -> None:
    authority, stranger = TestAuthority(tmp_path / "ours"), TestAuthority(tmp_path / "theirs")
    ours = authority.issue("gateway")
    password = Secret.from_file(server.password_path)
    async with tls_proxy(server.address, authority.issue("valkey"), authority.ca) as port:
        url = f"rediss://localhost:{port}/0"
        tls = files(authority, cert=ours.cert, key=ours.key)
        async with closing(connect(url, password=password, tls=tls)) as client:
            assert await client.ping()
        for bad in (files(authority), files(stranger, cert=ours.cert, key=ours.key)):
            async with closing(connect(url, password=password, tls=bad)) as client:
                with pytest.raises(StoreUnavailableError):
                    await client.ping()


async def test_certificates_towards_valkey_are_those_of_the_next_connection(
    tmp_path: Path, server: EmbeddedValkey
) -> None:
    old, new = TestAuthority(tmp_path / "old"), TestAuthority(tmp_path / "new")
    first, trusted = old.issue("gateway"), tmp_path / "trusted.pem"
    write(trusted, old.ca.read_bytes())
    password = Secret.from_file(server.password_path)
    tls = TlsFiles(ca=trusted, cert=first.cert, key=first.key)
    async with tls_proxy(server.address, old.issue("valkey"), old.ca) as port:
        client = connect(f"rediss://localhost:{port}/0", password=password, tls=tls)
        assert await client.ping()
    second = new.issue("gateway")
    for path, data in ((trusted, new.ca), (first.key, second.key), (first.cert, second.cert)):
        write(path, data.read_bytes())

    async with tls_proxy(server.address, new.issue("valkey"), new.ca, port=port), closing(client):
        assert await client.ping()
