"""A caller without credentials gets nothing of a running ``loraplex serve``; its user's command line needs no flags."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
import redis
from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_client import Client
from loraplex_client._profiles import profile_path
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.serve_process import SMALL, ServeProcess, children_of, command_of, is_alive, wait_until
from support.strangers import Caller

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

ENGINE, STORE = "/loraplex.v1.EngineService/", "/loraplex.v1.AdapterStoreService/"
CALLS = [
    *(ENGINE + name for name in ("Session", "Drain", "GetEngineInfo", "WatchLoad")),
    *(STORE + name for name in ("AttachEngine", "SetAlias", "DownloadAdapter", "WatchAliases", "ListAdapters")),
]
OK, DENIED = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED
UNAUTHENTICATED, UNREACHED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "tiny", TinyBase())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one", base, Recipe(rank=8))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[ServeProcess]:
    process = ServeProcess(tmp_path_factory.mktemp("serve") / "data", "--model", str(base), *SMALL)
    yield process
    process.close()


@pytest.fixture
def made(stack: ServeProcess) -> Path:
    """The folder of this run's credentials."""
    return run_folder(stack)


def run_folder(stack: ServeProcess) -> Path:
    (folder,) = (stack.data_dir / "credentials").glob("run-*")
    return folder


def target_of(stack: ServeProcess, method: str) -> str:
    return stack.engine if method.startswith(ENGINE) else stack.store


def loraplex(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraplex_client", *arguments]
    variables = {**os.environ, "COLUMNS": "160", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=60)


@pytest.mark.parametrize("method", CALLS)
def test_who_shows_too_little_is_refused_by_engine_and_store(stack: ServeProcess, made: Path, method: str) -> None:
    admin, engine = made / "admin", made / "engine"
    target = target_of(stack, method)

    assert Caller().ask(target, method) is UNREACHED
    assert Caller(trusts=admin).ask(target, method) is UNREACHED
    assert Caller(trusts=admin, key=admin).ask(target, method) is UNREACHED  # a key that leaked, no certificate
    assert Caller(trusts=admin, certificate=engine).ask(target, method) is UNAUTHENTICATED


@pytest.mark.parametrize(
    ("who", "method", "expected"),
    [
        ("engine", STORE + "SetAlias", DENIED),
        ("engine", STORE + "DownloadAdapter", DENIED),
        ("engine", STORE + "DeleteAdapter", DENIED),
        ("gateway", STORE + "AttachEngine", DENIED),
        ("gateway", STORE + "SetAlias", DENIED),
        ("gateway", ENGINE + "Drain", DENIED),
        ("admin", ENGINE + "Session", DENIED),
        ("admin", STORE + "AttachEngine", DENIED),
        ("engine", ENGINE + "WatchLoad", UNAUTHENTICATED),  # no engine calls another
        ("gateway", STORE + "WatchAliases", OK),
        ("gateway", ENGINE + "WatchLoad", OK),
        ("admin", ENGINE + "WatchLoad", OK),
        ("admin", STORE + "ListAdapters", OK),
    ],
)
def test_a_part_may_do_its_own_work_and_no_others(
    stack: ServeProcess, made: Path, who: str, method: str, expected: grpc.StatusCode
) -> None:
    caller = Caller(trusts=made / who, certificate=made / who, key=made / who)
    alias = adapter_pb2.Alias(name="x", label="latest", revision="0" * 64)
    request = adapter_store_pb2.SetAliasRequest(alias=alias) if method.endswith("SetAlias") else None

    assert caller.ask(target_of(stack, method), method, request) is expected


def test_valkey_answers_nobody_without_its_password(stack: ServeProcess) -> None:
    path = stack.data_dir / "valkey" / "valkey.sock"
    password = (stack.data_dir / "valkey" / "password").read_text().strip()

    with redis.Redis(unix_socket_path=str(path)) as stranger, pytest.raises(redis.exceptions.AuthenticationError):
        stranger.get("loraplex:engines")
    with (
        redis.Redis(unix_socket_path=str(path), password="guess") as guess,
        pytest.raises(redis.exceptions.AuthenticationError),
    ):
        guess.ping()
    with redis.Redis(unix_socket_path=str(path), password=password) as known:
        assert known.config_get("port") == {"port": "0"}  # no TCP at all
    assert path.stat().st_mode & 0o077 == 0


def secrets_of(stack: ServeProcess) -> dict[str, str]:
    files = [*run_folder(stack).glob("*/api-key"), stack.data_dir / "valkey" / "password"]
    return {str(file): file.read_text().strip() for file in files}


def test_no_command_line_and_no_log_shows_a_secret(stack: ServeProcess) -> None:
    secrets = secrets_of(stack)
    assert len(secrets) == 4
    shown = [command_of(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))]
    shown += [file.read_text(errors="replace") for file in stack.data_dir.rglob("*.log")]

    assert len(children_of(stack.pid)) == 4
    assert not any(secret in text for secret in secrets.values() for text in [*shown, stack.errors])


def test_the_command_line_of_the_same_user_needs_no_flags(stack: ServeProcess, adapter: Path) -> None:
    where = {"LORAPLEX_TARGET": stack.grpc}  # the port is a free one; else not even this

    results = [
        loraplex(*arguments, **where)
        for arguments in (
            ("adapters", "import", "first", str(adapter)),
            ("adapters", "list"),
            ("status",),
            ("status", "--engine-target", stack.engine),
            ("generate", "--adapter", "first", "--max-new-tokens", "1", "Hi"),
        )
    ]

    assert [(result.returncode, result.stderr) for result in results[1:]] == [(0, "")] * 4
    assert results[0].returncode == 0, results[0].stderr
    assert "first" in results[1].stdout
    assert "torch fp32" in results[3].stdout
    with Client(stack.grpc) as client:
        assert client.adapters.get("first").name == "first"


def test_who_says_what_to_use_is_not_given_what_serve_left(stack: ServeProcess, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("another\n")
    where = {"LORAPLEX_TARGET": stack.grpc}

    results = [
        loraplex("--api-key-file", str(tmp_path / "key"), "adapters", "list", **where),
        loraplex("adapters", "list", **where, LORAPLEX_API_KEY="another"),
    ]

    assert [result.returncode for result in results] == [1, 1]
    assert all("UNAUTHENTICATED" in result.stderr for result in results)


def test_without_the_profile_the_command_line_is_a_stranger(stack: ServeProcess, tmp_path: Path) -> None:
    result = loraplex("adapters", "list", "--store-target", stack.store, XDG_STATE_HOME=str(tmp_path))

    assert result.returncode == 1
    assert "cannot reach" in result.stderr


def test_two_stacks_do_not_mix(stack: ServeProcess, base: Path, adapter: Path, tmp_path: Path) -> None:
    other = ServeProcess(tmp_path / "data", "--model", str(base), *SMALL)
    try:
        with Client(other.grpc) as client:
            client.adapters.upload("only-there", adapter)
        listed = [loraplex("adapters", "list", LORAPLEX_TARGET=each.grpc) for each in (stack, other)]
        theirs = run_folder(other) / "admin"

        assert [result.returncode for result in listed] == [0, 0]
        assert ["only-there" in result.stdout for result in listed] == [False, True]
        assert (
            Caller(trusts=theirs, certificate=theirs, key=theirs).ask(stack.store, STORE + "ListAdapters") is UNREACHED
        )
    finally:
        other.close()
    assert not profile_path(other.grpc).exists()
    assert list((tmp_path / "data" / "credentials").glob("run-*")) == []


def test_what_a_killed_serve_leaves_is_its_users_alone_and_the_next_one_gets_on(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    killed = ServeProcess(data, "--model", str(base), *SMALL)
    children, left = killed.children(), run_folder(killed)
    secrets = secrets_of(killed)
    killed.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in children.values()))
    killed.close()

    files = [file for file in [*data.rglob("*"), profile_path(killed.grpc)] if file.is_file()]
    holding = [file for file in files if any(secret.encode() in file.read_bytes() for secret in secrets.values())]
    assert {str(file) for file in holding} == set(secrets)
    assert all(file.stat().st_mode & 0o077 == 0 for file in (*holding, *left.rglob("*"), profile_path(killed.grpc)))
    stale = loraplex("status", "--target", killed.grpc)
    assert stale.returncode == 1
    assert "is of a loraplex serve that has ended" in stale.stderr

    port = killed.grpc.rpartition(":")[2]
    again = ServeProcess(data, "--model", str(base), *SMALL, "--port", port)
    try:
        assert not left.exists()
        listed = loraplex("adapters", "list", LORAPLEX_TARGET=again.grpc)
        assert (listed.returncode, listed.stderr) == (0, "")
    finally:
        again.close()


def test_tenants_of_the_gateway_are_the_same_at_the_store(base: Path, adapter: Path, tmp_path: Path) -> None:
    keys = {"alice": "alice-key", "bob": "bob-key"}
    for name, key in keys.items():
        (tmp_path / name).write_text(f"{key}\n")
    (tmp_path / "keys").write_text("alice-key alice admin\nbob-key bob\n")
    stack = ServeProcess(tmp_path / "data", "--model", str(base), *SMALL, "--api-keys-file", str(tmp_path / "keys"))
    try:

        def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            file = {} if not name else {"LORAPLEX_API_KEY_FILE": str(tmp_path / name)}
            return loraplex(*arguments, LORAPLEX_TARGET=stack.grpc, **file)

        import_ = ("adapters", "import", "mine", str(adapter))
        generate = ("generate", "--max-new-tokens", "1", "Hi")
        assert call("bob", *import_).returncode == 1
        assert re.search(r"bob.* may not", call("bob", *import_).stderr)
        assert call("alice", *import_).returncode == 0
        assert call("", "adapters", "list").returncode == 0  # the user whose serve this is
        assert call("bob", *generate).returncode == 0
        assert "UNAUTHENTICATED" in call("", *generate).stderr
    finally:
        stack.close()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--redis-url", "redis://:pw@127.0.0.1:1"), "--redis-password-file"),
        (("--metrics-key", "k"), "No such option"),
        (("--redis-password-file", "f"), "--redis-url"),
    ],
)
def test_a_secret_on_the_command_line_is_refused(
    base: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    result = loraplex("serve", "--model", str(base), "--data-dir", str(tmp_path / "data"), *arguments)

    assert result.returncode == 2
    assert problem in result.stderr
    assert "pw" not in result.stderr.replace("--redis-password-file", "")
