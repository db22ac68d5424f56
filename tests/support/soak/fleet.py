"""Two stores, three engines, two gateways and one Valkey as child processes that are killed, stopped and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

import support
from loraplex_common.errors import LoraplexError
from loraplex_common.valkey import EmbeddedValkey, connect
from support.backend import ENGINE_FLAGS
from support.processes import ServiceProcess

NUM_STORES: Final = 2
NUM_ENGINES: Final = 3
NUM_GATEWAYS: Final = 2
STEP_S: Final = 0.02
PATIENCE_S: Final = 2.0
VALKEY_BYTES: Final = 2**30
START_ATTEMPTS: Final = 5
QUIET_PORT: Final = ("--metrics-port", "0")
# Below the ports that Linux gives to whichever process asks for a free one: else a stranger may hold a part's port when
# the part is started again.
STEADY_PORTS: Final = range(12_000, 32_000)


class Role(Enum):
    """The role of a part."""

    STORE = "store"
    ENGINE = "engine"
    GATEWAY = "gateway"


def steady_port() -> str:
    """Return a port that no process listens on, and that none is given unasked."""
    while True:
        port = secrets.choice(STEADY_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


class StartError(RuntimeError):
    """A part did not start; the message has its log."""


@dataclass
class Part:
    """A process that keeps its ports when it is started again.

    Attributes:
        spawn: Starts a process that listens on the given ports.
        born_s: When the present process was ready, in monotonic seconds.
        generation: Number of the present process, counted from the first.
        is_leaving: Whether it has been asked, or forced, to end.
    """

    name: str
    role: Role
    spawn: Callable[[Sequence[str]], ServiceProcess]
    hang_file: Path | None = None
    ports: tuple[str, ...] = field(default_factory=lambda: (steady_port(), steady_port()))
    process: ServiceProcess = field(init=False)
    born_s: float = 0.0
    generation: int = 0
    is_leaving: bool = False

    @property
    def grpc(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def http(self) -> str:
        """``host:port`` of a gateway."""
        return f"127.0.0.1:{self.ports[1]}"

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            StartError: If it does not start.
        """
        await asyncio.to_thread(self._start)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        if self.process.is_running:
            os.kill(self.process.pid, number)

    async def kill(self) -> None:
        """End the process at once."""
        self.is_leaving = True
        await asyncio.to_thread(self.process.kill)

    async def stop(self) -> int:
        """Ask the process to end, and return its status."""
        self.is_leaving = True
        return await asyncio.to_thread(self.process.stop)

    def _start(self) -> None:
        for attempt in range(START_ATTEMPTS):
            self.process = self.spawn(self.ports)
            try:
                self.process.wait_ready()
            except AssertionError as error:
                # Another process's connection may have taken the port in between.
                is_taken = "cannot listen on" in str(error) or "is taken by another process" in str(error)
                if not is_taken or attempt == START_ATTEMPTS - 1:
                    raise StartError(str(error)[-4000:]) from error
                time.sleep(1.0)
            else:
                break
        self.born_s = time.monotonic()
        self.generation += 1
        self.is_leaving = False


class Fleet:
    """All parts of a fleet.

    Args:
        directory: Empty; for logs and data, an attribute, too.
        model: Base model.
        import_root: Directory that contains the adapters.
    """

    def __init__(self, directory: Path, model: Path, import_root: Path) -> None:
        self.directory = directory
        self._model = model
        self._import_root = import_root
        self.valkey = EmbeddedValkey(directory / "valkey", max_memory_bytes=VALKEY_BYTES)
        self.stores = [self._store(i) for i in range(NUM_STORES)]
        self.engines = [self._engine(i) for i in range(NUM_ENGINES)]
        self.gateways = [self._gateway(i) for i in range(NUM_GATEWAYS)]

    @property
    def parts(self) -> list[Part]:
        """All but Valkey."""
        return [*self.stores, *self.engines, *self.gateways]

    def store_of(self, index: int) -> Part:
        """Return the store that the gateway or engine with a number follows."""
        return self.stores[index % NUM_STORES]

    async def start(self) -> None:
        """Start everything; each kind starts before the kinds that need it."""
        self.valkey.start()
        for kind in (self.stores, self.engines, self.gateways):
            await asyncio.gather(*(part.start() for part in kind))

    async def close(self) -> list[str]:
        """End everything and return the parts that did not end well."""
        for part in self.parts:
            part.signal(signal.SIGCONT)
        statuses = await asyncio.gather(*(part.stop() for part in reversed(self.parts) if part.process.is_running))
        troubles = [f"a part ended with {status}" for status in statuses if status != 0]
        self.valkey.close()
        return troubles

    def kill(self) -> None:
        """End everything at once, after the soak itself has failed."""
        for part in self.parts:
            if hasattr(part, "process") and part.process.is_running:
                part.process.kill()
        if (pid := self.valkey.pid) is not None:
            os.kill(pid, signal.SIGCONT)
        self.valkey.close()

    def revive_valkey(self) -> None:
        """Start Valkey again; call it on the main thread, as Valkey's life is tied to its thread."""
        self.valkey.start()

    async def limit_valkey(self, num_bytes: int) -> None:
        """Set how much memory Valkey takes before it refuses writes."""
        client = connect(self.valkey.url)
        try:
            await client.config_set("maxmemory", num_bytes)
        finally:
            await client.aclose()

    async def valkey_answers(self) -> bool:
        """Return whether Valkey answers."""
        client = connect(self.valkey.url, socket_timeout_s=1.0)
        try:
            return bool(await client.ping())
        except LoraplexError:
            return False
        finally:
            await client.aclose()

    def _engine(self, index: int) -> Part:
        hang_file = self.directory / f"hang-{index}"

        def spawn(ports: Sequence[str]) -> ServiceProcess:
            sizes = ("--pool-bytes", "4MiB", "--arena-bytes", "2MiB", "--max-num-seqs", "32", "--num-threads", "1")
            flags = (*sizes, *ENGINE_FLAGS, "--step-patience-s", str(PATIENCE_S), "--drain-settle-s", "0")
            peers = ("--store-target", self.store_of(index).grpc, "--redis-url", self.valkey.url)
            listen = ("--port", ports[0], *QUIET_PORT)
            arguments = [str(hang_file), str(STEP_S), "--model", str(self._model), *flags, *peers, *listen]
            path = {"PYTHONPATH": str(Path(support.__path__[0]).parent)}
            logs = self._logs(f"engine{index}")
            return ServiceProcess("support.soak.paced_engine", arguments, log_dir=logs, environment=path)

        return Part(f"engine{index}", Role.ENGINE, spawn, hang_file)

    def _gateway(self, index: int) -> Part:
        def spawn(ports: Sequence[str]) -> ServiceProcess:
            peers = ("--store-target", self.store_of(index).grpc, "--redis-url", self.valkey.url)
            listen = ("--port", ports[0], "--http-port", ports[1], *QUIET_PORT)
            arguments = ["--model", str(self._model), *peers, *listen, "--drain-settle-s", "0", "--drain-grace-s", "8"]
            return ServiceProcess("loraplex_gateway", arguments, log_dir=self._logs(f"gateway{index}"))

        return Part(f"gateway{index}", Role.GATEWAY, spawn)

    def _store(self, index: int) -> Part:
        def spawn(ports: Sequence[str]) -> ServiceProcess:
            flags = ("--import-root", str(self._import_root), "--redis-url", self.valkey.url, "--drain-settle-s", "0")
            listen = ("--port", ports[0], *QUIET_PORT, "--max-adapter-bytes", "8MiB", "--gc-grace-s", "10")
            arguments = ["--model", str(self._model), *flags, *listen]
            return ServiceProcess("loraplex_adapter_store", arguments, log_dir=self._logs(f"store{index}"))

        return Part(f"store{index}", Role.STORE, spawn)

    def _logs(self, name: str) -> Path:
        directory = self.directory / "logs" / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory
