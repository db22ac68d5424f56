"""``loraplex serve`` as a user runs it: a process, its ready line, its children."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

START_TIMEOUT_S = 180.0
SMALL = ("--num-threads", "1", "--pool-bytes", "64MiB", "--arena-bytes", "32MiB", "--drain-grace-s", "5")


class ServeProcess:
    """One running ``loraplex serve`` on free ports.

    Attributes:
        grpc: The gateway's address.
        http: Address of the gateway's OpenAI-compatible port.
        metrics: Address of the gateway's /metrics.
        engine: The (first) engine's gRPC address.
        engines: Those of all engines.
        engine_metrics: Address of each engine's /metrics.
        store: The adapter store's address.
        data_dir: Directory of its data.
    """

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self._stderr_path = data_dir.with_suffix(".err")
        command = ("-m", "loraplex_client", "serve")
        with self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *command, "--data-dir", str(data_dir), "--base-port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._read_head()
        except BaseException:
            self.close()
            raise

    def _read_head(self) -> None:
        head = self._wait_ready()
        self.grpc, self.http = head["grpc"], head["http"]
        self.metrics, engine_metrics = self._wait_line(r"curl http://(\S+/metrics   engine metrics: .+)").split(
            "/metrics   engine metrics: "
        )
        self.engine_metrics = engine_metrics.split()
        self.store, engines = re.split(
            "   engines?: ", self._wait_line(r"adapter store: (\S+   engines?: .+)   logs: ")
        )
        self.engines = engines.split()
        self.engine = self.engines[0]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def errors(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    def children(self) -> dict[str, int]:
        """Return the live children: name -> process id."""
        found = {}
        for pid in children_of(self.pid):
            command = command_of(pid)
            name = re.search(r"-m loraplex_(\w+)|(valkey)-server", command)
            if name:
                found[name[1] or name[2]] = pid
        return found

    def engine_pids(self) -> list[int]:
        """Return the live engines in the order in which they were started, but for those that were started again."""
        return sorted(pid for pid in children_of(self.pid) if "-m loraplex_engine " in command_of(pid))

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(30)

    def kill(self) -> None:
        """Send SIGKILL, as the kernel does when memory runs out."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process, whatever its state."""
        if self._process.poll() is None:
            try:
                self.terminate()
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(5)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    def _wait_ready(self) -> dict[str, str]:
        line = self._wait_line(r"ready: (.*)")
        return dict(word.split("=", 1) for word in line.split())

    def _wait_line(self, pattern: str) -> str:
        while True:
            line = self._lines.get(timeout=START_TIMEOUT_S)
            if line is None:
                raise AssertionError(f"serve ended with {self._process.wait()}:\n{self.errors}")
            if match := re.search(pattern, line):
                return match[1]


def children_of(parent: int) -> list[int]:
    """Return the process ids of a process's live children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent_pid = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
            except OSError:
                continue
            if int(parent_pid) == parent and state != "Z":
                found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """Return a process's command line; empty if it is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_until(claim: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: If it does not hold within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.05)
