"""A store in a process of its own that starts in a fraction of a second: it is forked from one that has imported everything."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_adapter_store.config import StoreConfig
from loraplex_adapter_store.service import running_store
from loraplex_common.log import configure

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

START_S = 30.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["support.forked_store"])


class ForkedStore:
    """A store that can be killed.

    Args:
        settings: Fields of `StoreConfig`.
        log_path: File to which its log is appended.

    Attributes:
        target: Address of the running store.
    """

    def __init__(self, settings: dict[str, Any], log_path: Path) -> None:
        self._settings = settings
        self._log_path = log_path
        self._process: multiprocessing.process.BaseProcess | None = None
        self.target = ""

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.is_alive()

    def start(self) -> None:
        """Start it and return once it serves."""
        mine, other = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_serve, args=(self._settings, str(self._log_path), other), daemon=True)
        self._process.start()
        other.close()
        if not mine.poll(START_S):
            raise RuntimeError(f"the store has not started: {self._log_path.read_text()[-4000:]}")
        self.target = f"127.0.0.1:{mine.recv()}"

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()


def _serve(settings: dict[str, Any], log_path: str, ready: Connection) -> None:
    sys.stdout = sys.stderr = Path(log_path).open("a", buffering=1)  # noqa: SIM115 -- open until the process ends
    configure("adapter_store", level="info", fmt="console")

    async def run() -> None:
        async with running_store(StoreConfig(**settings)) as store:
            ready.send(store.grpc_port)
            await store.supervisor.run_until(asyncio.Event())

    asyncio.run(run())
