"""Our services as child processes: started for real, asked for their addresses, stopped or killed."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class ServiceProcess:
    """One ``python -m MODULE`` and the addresses of its ready line.

    Args:
        module: The module, e.g. ``loraplex_engine``.
        arguments: Command line.
        log_dir: Gets ``MODULE-N.log`` with the process's stderr.
        environment: Variables in addition to this process's.

    Attributes:
        addresses: ``grpc``, ``metrics`` and for a gateway ``http`` -> ``host:port``.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, log_dir: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        number = len(list(log_dir.glob(f"{module}-*.log")))
        self.log_path = log_dir / f"{module}-{number}.log"
        self.addresses: dict[str, str] = {}
        arguments, secrets = _without_secrets(module, arguments)
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | secrets | dict(environment or {})
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | variables,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"stdout-{module}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    @property
    def grpc(self) -> str:
        """``host:port`` of the gRPC server."""
        return self.addresses["grpc"]

    def wait_ready(self) -> ServiceProcess:
        """Return once the process reports that it is ready.

        Raises:
            AssertionError: If it ends or reports nothing; the message has its log.
        """
        try:
            line = self._lines.get(timeout=READY_TIMEOUT_S)
        except queue.Empty:
            line = ""
        if not line.startswith("ready: "):
            self.kill()
            raise AssertionError(f"{self.log_path.stem} is not ready: {line!r}\n{self.log()}")
        self.addresses = dict(re.findall(r"(\w+)=(\S+)", line))
        return self

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.log_path.stem} ignores SIGTERM\n{self.log()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, such as SIGSTOP: it then hangs until SIGCONT."""
        self._process.send_signal(number)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the process stand still for a while."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for the end and return the exit status."""
        status = self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status

    def log(self) -> str:
        """Return the process's stderr."""
        return self.log_path.read_text(errors="replace")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode().rstrip("\n"))
        self._lines.put("")  # the process has ended


def _without_secrets(module: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Move the URL of Valkey to the environment: a test's own URL has the password, which no command line takes."""
    words = list(arguments)
    if "--redis-url" not in words:
        return words, {}
    at = words.index("--redis-url")
    url = words[at + 1]
    del words[at : at + 2]
    service = (
        module if module.startswith("loraplex_") else "loraplex_engine"
    )  # a module that is not a service wraps an engine
    return words, {f"{service.upper()}_REDIS_URL": url}
