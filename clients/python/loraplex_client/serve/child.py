"""One service as a child process: started, known to be ready, restarted on the same ports, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loraplex_common.child_process import owned_command
from loraplex_common.log_files import RotatingLog

if TYPE_CHECKING:
    from pathlib import Path

READY_PREFIX: Final = "ready: "
LOG_TAIL_LINES: Final = 20


class ChildError(RuntimeError):
    """A child could not be started; the message has the end of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """How to run one service.

    Attributes:
        module: Run as ``python -m module``.
        ports: Kind of address in the ready line -> (flag, port to ask for; 0 picks a free one).
        environment: Variables on top of our own.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    ports: Mapping[str, tuple[str, int]]
    environment: Mapping[str, str] = field(default_factory=dict)


class ServiceChild:
    """Runs one service. `start` belongs on the main thread, see `owned_command`.

    Attributes:
        addresses: Kind (``grpc``, ``http``, ``metrics``) -> ``host:port``, once ready.
    """

    def __init__(self, spec: ServiceSpec, log_dir: Path) -> None:
        self.name = spec.name
        self.addresses: dict[str, str] = {}
        self._log = RotatingLog(log_dir / f"{spec.name}.log")
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._drain_stdout: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the service and return once it says that it is ready.

        Raises:
            ChildError: If it ends before.
        """
        log = self._log.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *owned_command(self._command()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._spec.environment},
                process_group=0,  # the terminal's Ctrl-C reaches us alone, so that parts end in order
            )
        finally:
            os.close(log)
        stdout = self._process.stdout
        assert stdout is not None
        while raw := await stdout.readline():
            line = raw.decode(errors="replace").strip()
            if line.startswith(READY_PREFIX):
                self.addresses = dict(word.split("=", 1) for word in line.removeprefix(READY_PREFIX).split())
                # Whatever else it prints must not fill the pipe.
                self._drain_stdout = asyncio.create_task(_discard(stdout))
                return
        code = await self._process.wait()
        await asyncio.to_thread(self._log.drain)
        raise ChildError(
            f"{self.name} ended with {_exit_text(code)} while starting; its last words:\n{self.log_tail()}"
        )

    async def wait(self) -> str:
        """Wait until the service ends; return how."""
        assert self._process is not None, "started"
        code = await self._process.wait()
        await asyncio.to_thread(self._log.drain)
        return _exit_text(code)

    async def stop(self, timeout_s: float) -> None:
        """Ask the service to drain and end; kill it if it takes longer than ``timeout_s``."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        if self._drain_stdout is not None:
            await self._drain_stdout

    def kill(self) -> None:
        """End the service at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        return self._log.tail(LOG_TAIL_LINES)

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", self._spec.module, *self._spec.arguments]
        for kind, (flag, port) in self._spec.ports.items():
            bound = self.addresses.get(kind)  # after a restart: the address that the other parts know
            command += [flag, bound.rpartition(":")[2] if bound else str(port)]
        return command


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
