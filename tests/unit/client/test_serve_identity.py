"""The credentials of one ``loraplex serve``: private, renewed in time, gone with the run, told apart from another's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_client._profiles import profile_path, read_profile
from loraplex_client._servers import Servers
from loraplex_client.credentials import folder
from loraplex_client.credentials.certificates import read_certificate
from loraplex_client.serve.child import ChildError
from loraplex_client.serve.identity import ServeIdentity
from loraplex_common.auth import Authenticator, Role
from loraplex_common.errors import UnauthenticatedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 20.0
GATEWAY, STORE, ENGINE = "127.0.0.1:9500", "127.0.0.1:9510", "127.0.0.1:9520"


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(folder, "SETTLE_S", 0.1)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., ServeIdentity]]:
    with contextlib.ExitStack() as stack:

        def make(**options: object) -> ServeIdentity:
            identity = ServeIdentity(tmp_path / "data", **options)  # type: ignore[arg-type]
            stack.callback(identity.close)
            return identity

        yield make


@contextlib.asynccontextmanager
async def kept_fresh(identity: ServeIdentity, reports: list[str] | None = None):  # type: ignore[no-untyped-def]  # noqa: ANN201
    task = asyncio.create_task(identity.keep_fresh((reports if reports is not None else []).append))
    yield
    assert not task.done()
    task.cancel()


async def until(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline, "still not so"
        await asyncio.sleep(0.02)


def value_of(flags: tuple[str, ...], flag: str) -> Path:
    return Path(flags[flags.index(flag) + 1])


def test_flags_name_files_and_hold_no_secret(made: Callable[..., ServeIdentity]) -> None:
    identity = made()

    for flags in (identity.store_flags(), identity.engine_flags(), identity.gateway_flags()):
        files = [Path(word) for word in flags if word.startswith("/")]
        assert files
        assert all(file.is_file() and file.stat().st_mode & 0o077 == 0 for file in files)
        secrets = [file.read_text().strip() for file in identity.path.glob("*/api-key")]
        assert not any(secret in word for secret in secrets for word in flags)


def test_engine_and_gateway_are_known_to_the_store_as_what_they_are(made: Callable[..., ServeIdentity]) -> None:
    identity = made()
    store = Authenticator.from_file(value_of(identity.store_flags(), "--api-keys-file"))

    roles = [
        store.authenticate(f"Bearer {value_of(flags, '--peer-api-key-file').read_text().strip()}").role
        for flags in (identity.engine_flags(), identity.gateway_flags())
    ]

    assert roles == [Role.ENGINE, Role.GATEWAY]


def test_two_runs_on_one_data_folder_share_nothing(made: Callable[..., ServeIdentity]) -> None:
    first, second = made(), made()

    assert first.path != second.path
    ours = Authenticator.from_file(value_of(first.store_flags(), "--api-keys-file"))
    theirs = value_of(second.engine_flags(), "--peer-api-key-file").read_text().strip()
    with pytest.raises(UnauthenticatedError):
        ours.authenticate(f"Bearer {theirs}")


def test_a_run_leaves_a_profile_and_takes_it_along(made: Callable[..., ServeIdentity]) -> None:
    identity = made()

    engines = [ENGINE, "127.0.0.1:9522"]
    path = identity.leave_profile(gateway=GATEWAY, store=STORE, engines=engines)

    assert path == profile_path(GATEWAY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Servers(GATEWAY).store.tls_ca == identity.path / "admin" / "ca.crt"
    assert {Servers(store_target=STORE).engine(each).tls_name for each in engines} == {"engine.loraplex.internal"}
    identity.close()
    assert not path.exists()
    assert not identity.path.exists()


def test_a_run_does_not_take_the_profile_of_its_successor_along(made: Callable[..., ServeIdentity]) -> None:
    first, second = made(), made()
    first.leave_profile(gateway=GATEWAY, store=STORE, engines=[ENGINE])
    path = second.leave_profile(gateway=GATEWAY, store=STORE, engines=[ENGINE])

    first.close()

    assert read_profile(path).lock == second.path / "lock"


async def test_certificates_are_renewed_long_before_they_end(made: Callable[..., ServeIdentity]) -> None:
    identity = made(lifetime_s=6.0)
    certificate = identity.path / "engine" / "tls.crt"
    first = read_certificate(certificate).ends
    reports: list[str] = []

    async with kept_fresh(identity, reports):
        await until(lambda: read_certificate(certificate).ends > first)

    assert time.time() < first.timestamp()
    assert reports == []


async def test_what_is_in_the_way_of_a_renewal_is_said_and_tried_again(made: Callable[..., ServeIdentity]) -> None:
    identity = made(lifetime_s=3.0)
    certificate = identity.path / "engine" / "tls.crt"
    first, text = read_certificate(certificate).ends, certificate.read_bytes()
    reports: list[str] = []

    async with kept_fresh(identity, reports):
        certificate.unlink()
        await until(lambda: reports != [])
        certificate.write_bytes(text)
        await until(lambda: read_certificate(certificate).ends > first)

    assert len(reports) == 1
    assert "engine/tls.crt missing" in reports[0]


async def test_the_gateways_users_are_known_to_the_store_as_long_as_their_file_says_so(
    made: Callable[..., ServeIdentity], tmp_path: Path
) -> None:
    users = tmp_path / "keys"
    users.write_text("alice-key alice admin\nbob-key bob group=g\ncn=gateway eve admin\nsecret-2 m metrics\n")
    identity = made(user_keys=users)
    file = value_of(identity.store_flags(), "--api-keys-file")

    def role_of(key: str) -> Role | None:
        try:
            return Authenticator.from_file(file).authenticate(f"Bearer {key}").role
        except UnauthenticatedError:
            return None

    assert [role_of(key) for key in ("alice-key", "bob-key", "secret-2")] == [Role.ADMIN, Role.TENANT, None]
    assert "eve" not in file.read_text()
    assert "alice-key" not in file.read_text()
    async with kept_fresh(identity):
        users.write_text("bob-key bob\n")
        await until(lambda: role_of("alice-key") is None)
    assert role_of("bob-key") is Role.TENANT
    assert role_of((identity.path / "admin" / "api-key").read_text().strip()) is Role.ADMIN


def test_a_keys_file_that_cannot_be_used_ends_it_by_name(made: Callable[..., ServeIdentity], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("only-a-key\n")

    with pytest.raises(ChildError, match=r"keys:1: expected"):
        made(user_keys=tmp_path / "keys")

    assert [left.name for left in (tmp_path / "data" / "credentials").iterdir()] == [".lock"]


OWNER = """
import sys, time
from pathlib import Path
from loraplex_client.serve.identity import ServeIdentity
identity = ServeIdentity(Path(sys.argv[1]))
identity.leave_profile(gateway="127.0.0.1:9500", store="127.0.0.1:9510", engines=["127.0.0.1:9520"])
print(identity.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_run_leaves_nobody_else_can_read_and_the_next_one_removes(
    made: Callable[..., ServeIdentity], tmp_path: Path
) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        assert Servers(GATEWAY).store.target == STORE
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate()

    files = [left, *left.rglob("*"), left.parent, profile_path(GATEWAY)]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    with pytest.warns(UserWarning, match="has ended"):
        assert Servers(GATEWAY).store.tls_ca is None

    identity = made()

    assert not left.exists()
    assert identity.path.exists()


def store_knows(identity: ServeIdentity, secret: str) -> bool:
    known = Authenticator.from_file(value_of(identity.store_flags(), "--api-keys-file"))
    try:
        known.authenticate(f"Bearer {secret}")
    except UnauthenticatedError:
        return False
    return True


async def test_a_key_is_taken_from_the_store_though_certificates_cannot_be_renewed(
    made: Callable[..., ServeIdentity], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-a acme\nsecret-b beta\n")
    identity = made(user_keys=keys)
    reports: list[str] = []
    async with kept_fresh(identity, reports):
        (identity.path / "engine" / "tls.key").unlink()
        await until(lambda: bool(reports))

        keys.write_text("secret-b beta\n")

        await until(lambda: not store_knows(identity, "secret-a"))
        assert store_knows(identity, "secret-b")
        assert len(reports) == 1


async def test_a_key_is_taken_from_the_store_as_soon_as_it_can_be_written_down(
    made: Callable[..., ServeIdentity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-a acme\nsecret-b beta\n")
    identity = made(user_keys=keys)
    reports: list[str] = []

    def is_full(path: Path, content: bytes | str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    async with kept_fresh(identity, reports):
        with monkeypatch.context() as disk:
            disk.setattr("loraplex_client.serve.identity.write_private", is_full)
            keys.write_text("secret-b beta\n")
            await until(lambda: bool(reports))

        await until(lambda: not store_knows(identity, "secret-a"))
        assert store_knows(identity, "secret-b")
