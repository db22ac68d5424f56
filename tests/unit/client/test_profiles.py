"""Client profiles: found by the server's address while their serve runs, and second to what the caller says."""

from __future__ import annotations

import fcntl
import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_client import Client
from loraplex_client._profiles import (
    Profile,
    ProfileError,
    ServerProfile,
    StaleProfileWarning,
    profile_path,
    profile_text,
    profiles_dir,
    read_profile,
)
from loraplex_client._servers import Credentials, Servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.cli_runner import Runner

GATEWAY, STORE, ENGINE = "127.0.0.1:9500", "127.0.0.1:9510", "127.0.0.1:9520"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    profiles_dir().mkdir(parents=True)
    return profiles_dir()


def profile(tmp_path: Path, gateway: str = GATEWAY, store: str = STORE, engine: str = ENGINE) -> Profile:
    (tmp_path / "key").write_text(f"key-of-{store}\n")
    (tmp_path / "lock").touch()
    inner = {"tls_ca": tmp_path / "ca", "tls_cert": tmp_path / "crt", "tls_key": tmp_path / "tls"}
    key = tmp_path / "key"
    return Profile(
        gateway=ServerProfile(target=gateway),
        store=ServerProfile(target=store, tls_name="the-store", api_key_file=key, **inner),
        engine=ServerProfile(target=engine, tls_name="an-engine", api_key_file=key, **inner),
        lock=tmp_path / "lock",
    )


def leave(left: Profile) -> Path:
    assert left.gateway.target is not None
    path = profile_path(left.gateway.target)
    path.write_text(profile_text(left))
    path.chmod(0o600)
    return path


@contextmanager
def running(left: Profile) -> Iterator[None]:
    """Be the serve that has left a profile."""
    assert left.lock is not None
    leave(left)
    with left.lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_profile_reads_as_it_was_written(tmp_path: Path) -> None:
    left = profile(tmp_path)

    assert read_profile(leave(left)) == left


@pytest.mark.parametrize("target", [GATEWAY, "localhost:9500", "0.0.0.0:9500"])
def test_the_store_of_a_running_serve_is_called_with_what_it_left(tmp_path: Path, target: str) -> None:
    with running(profile(tmp_path)):
        servers = Servers(target)

    assert (servers.gateways[0].target, servers.gateways[0].tls_ca, servers.gateways[0].api_key) == (target, None, None)
    assert (servers.store.target, servers.store.tls_name) == (STORE, "the-store")
    assert servers.store.tls_ca == tmp_path / "ca"
    assert (servers.store.tls_cert, servers.store.tls_key) == (tmp_path / "crt", tmp_path / "tls")
    assert servers.store.api_key == f"key-of-{STORE}"


def test_a_store_and_an_engine_are_found_by_their_own_addresses(tmp_path: Path) -> None:
    with running(profile(tmp_path)):
        servers = Servers(store_target=STORE)
        assert servers.store.tls_ca == tmp_path / "ca"
        assert servers.engine(ENGINE).tls_name == "an-engine"
        assert servers.engine("127.0.0.1:1").tls_ca is None


def test_several_serves_do_not_mix(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    first = profile(folders[0])
    second = profile(folders[1], "127.0.0.1:9600", "127.0.0.1:9610", "127.0.0.1:9620")

    with running(first), running(second):
        assert Servers(GATEWAY).store.tls_ca == folders[0] / "ca"
        assert Servers("127.0.0.1:9600").store.tls_ca == folders[1] / "ca"
        assert Servers("127.0.0.1:9600", STORE).store.tls_ca == folders[0] / "ca"
        assert Servers("127.0.0.1:9700").store.tls_ca is None


def test_what_the_caller_says_counts_before_a_profile(tmp_path: Path) -> None:
    own = Credentials(api_key="mine", tls_ca=Path("ca"), tls_cert=Path("crt"), tls_key=Path("key"))

    with running(profile(tmp_path)):
        store = Servers(GATEWAY, credentials=own).store
        elsewhere = Servers(GATEWAY, "10.0.0.1:8510").store

    assert (store.api_key, store.tls_ca, store.tls_cert, store.tls_key) == (
        "mine",
        Path("ca"),
        Path("crt"),
        Path("key"),
    )
    assert store.tls_name is None  # an authority of the caller's own certifies names of its own
    assert (elsewhere.target, elsewhere.tls_ca, elsewhere.api_key) == ("10.0.0.1:8510", None, None)


def test_a_profile_that_is_named_brings_its_own_targets(tmp_path: Path) -> None:
    (tmp_path / "admin").mkdir()
    (tmp_path / "admin" / "api-key").write_text("k\n")
    values = {"gateway": {"target": "g:1"}, "store": {"target": "s:1", "tls_ca": "ca.crt", "api_key_file": "api-key"}}
    named = tmp_path / "admin" / "profile.json"
    named.write_text(json.dumps(values))

    servers, moved = Servers(profile=named), Servers("g:2", "s:2", profile=named)

    assert (servers.gateways[0].target, servers.store.target) == ("g:1", "s:1")
    assert (moved.gateways[0].target, moved.store.target) == ("g:2", "s:2")
    assert [each.store.tls_ca for each in (servers, moved)] == [tmp_path / "admin" / "ca.crt"] * 2
    assert servers.store.api_key == "k"


def test_the_profile_of_a_serve_that_has_ended_is_named_and_left_alone(tmp_path: Path) -> None:
    path = leave(profile(tmp_path))

    with pytest.warns(StaleProfileWarning, match="is of a loraplex serve that has ended") as caught:
        Client(GATEWAY).close()
    assert str(path) in str(caught[0].message)

    with warnings.catch_warnings(record=True):
        assert Servers(GATEWAY).store.tls_ca is None


def test_the_command_line_says_so_too(loraplex: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    leave(profile(tmp_path, gateway=os.environ["LORAPLEX_TARGET"]))

    result = loraplex("generate", "Once")

    assert result.code == 0
    assert "note: " in result.err
    assert "has ended" in result.err


def test_a_profile_that_others_may_write_is_none(tmp_path: Path) -> None:
    left = profile(tmp_path)

    with running(left):
        profile_path(GATEWAY).chmod(0o666)
        assert Servers(GATEWAY).store.tls_ca is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "it is no JSON"),
        ("[]", "expected an object"),
        ('{"gate": {}}', "expected an object"),
        ('{"store": {"api_key": "secret"}}', "store has no api_key: api_key_file"),
        ('{"store": {"target": 1}}', "store must be an object of strings"),
        (None, "No such file"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named_and_no_secret_of_it(
    tmp_path: Path, text: str | None, problem: str
) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)

    with pytest.raises(ProfileError, match=problem) as caught:
        Servers(profile=path)

    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
