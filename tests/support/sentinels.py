"""A Valkey primary with a replica and a Sentinel, as real processes on free ports."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import redis
from loraplex_common.child_process import owned_command
from loraplex_common.secret import Secret
from loraplex_common.valkey import server_binary
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PRIMARY = "loraplex"
PASSWORD = Secret("of-the-servers")
SENTINEL_PASSWORD = Secret("of-the-sentinel")
READY_S = 20.0
_DURABLE = ("appendonly yes", "appendfsync everysec", 'save ""', "maxmemory-policy noeviction")
_SERVER = (*_DURABLE, "repl-diskless-sync-delay 0", f"masterauth {PASSWORD.reveal()}")


@dataclass
class WatchedValkey:
    """Servers that a Sentinel watches.

    Attributes:
        url: URL of the primary, as `--redis-url` takes it.
        ports: Ports of the servers; the first is the primary at first.
    """

    url: str
    ports: tuple[int, int]
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def client(self, port: int) -> redis.Redis:
        """Return a client of one server."""
        return _client(port, PASSWORD)

    def role(self, port: int) -> str:
        """Return a server's role; empty while it does not answer."""
        try:
            return str(self.client(port).info("replication")["role"])
        except redis.RedisError:
            return ""

    def kill_primary(self) -> None:
        """End the first server as a crash would."""
        self.processes[self.ports[0]].kill()
        self.processes[self.ports[0]].wait()


@contextmanager
def valkey_server(
    directory: Path, *lines: str, is_sentinel: bool = False, password: Secret | None = None
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server with a configuration on a free TCP port until the block ends; yield its port and its process."""
    directory.mkdir(parents=True)
    port = free_port()
    if password is not None:
        lines = (*lines, f"requirepass {password.reveal()}")
    config = directory / "valkey.conf"
    config.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {directory}", "protected-mode no", *lines]))
    command = [str(server_binary()), str(config), *(["--sentinel"] if is_sentinel else [])]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(owned_command(command), stdout=log, stderr=log, cwd=directory, env=dict(os.environ))
    try:
        _wait_for(lambda: bool(_client(port, password).ping()))
        yield port, process
    finally:
        process.kill()
        process.wait()


@contextmanager
def watched_valkey(directory: Path) -> Iterator[WatchedValkey]:
    """Run a primary, a replica that has its data, and a Sentinel that fails over within a second."""
    with contextlib.ExitStack() as stack:
        first, first_process = stack.enter_context(valkey_server(directory / "first", *_SERVER, password=PASSWORD))
        replica_of = f"replicaof 127.0.0.1 {first}"
        second, second_process = stack.enter_context(
            valkey_server(directory / "second", *_SERVER, replica_of, password=PASSWORD)
        )
        _wait_for(lambda: _client(second, PASSWORD).info("replication")["master_link_status"] == "up")
        watch = (
            f"sentinel monitor {PRIMARY} 127.0.0.1 {first} 1",
            f"sentinel down-after-milliseconds {PRIMARY} 300",
            f"sentinel failover-timeout {PRIMARY} 2000",
            f"sentinel auth-pass {PRIMARY} {PASSWORD.reveal()}",
        )
        sentinel, _ = stack.enter_context(
            valkey_server(directory / "sentinel", *watch, is_sentinel=True, password=SENTINEL_PASSWORD)
        )
        _wait_for(lambda: bool(_client(sentinel, SENTINEL_PASSWORD).sentinel_slaves(PRIMARY)))
        url = f"redis-sentinel://127.0.0.1:1,127.0.0.1:{sentinel}/0#{PRIMARY}"  # the first one is always away
        yield WatchedValkey(url, (first, second), {first: first_process, second: second_process})


def _client(port: int, password: Secret | None) -> redis.Redis:
    return redis.Redis(port=port, password=password.reveal() if password else None, retry=Retry(NoBackoff(), 0))


def _wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            if is_so():
                return
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.02)


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
