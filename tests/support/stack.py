"""The whole of loraplex on one machine: a real Valkey and our three services as child processes on free ports."""

from __future__ import annotations

import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_client import AsyncClient, Client
from loraplex_common.errors import NoEngineError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.valkey import EmbeddedValkey
from prometheus_client.parser import text_string_to_metric_families
from support.backend import ENGINE_FLAGS, kibibytes
from support.processes import ServiceProcess
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOUND_TIMEOUT_S = 20.0
FREE_PORTS = ("--port", "0")
PACKAGES = (
    "clients/python",
    "kernels",
    "proto/gen",
    *(f"services/{each}" for each in ("adapter_store", "common", "engine", "gateway")),
)
"""Where a checkout has the packages that services are made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackFlags:
    """Command-line flags in addition to those that connect the services.

    Attributes:
        checkout: The checkout whose code processes run from now on; None means this one.
    """

    checkout: Path | None = None
    num_stores: int = 1
    engine: tuple[str, ...] = ("--pool-bytes", kibibytes(8192), "--arena-bytes", kibibytes(8192))
    store: tuple[str, ...] = ()
    gateway: tuple[str, ...] = ()


@dataclass(slots=True)
class Stack:
    """Processes of one stack; made by `running_stack`.

    Attributes:
        import_root: Directory from which the store imports.
        more_stores: Further replicas of the store, `StackFlags.num_stores` less one.
    """

    model: Path
    import_root: Path
    log_dir: Path
    flags: StackFlags
    valkey: EmbeddedValkey
    store: ServiceProcess = field(init=False)
    gateway: ServiceProcess = field(init=False)
    engines: list[ServiceProcess] = field(default_factory=list)
    more_stores: list[ServiceProcess] = field(default_factory=list)

    @property
    def store_target(self) -> str:
        """What engines and gateways are given."""
        return ",".join(store.grpc for store in (self.store, *self.more_stores))

    def start(self) -> None:
        """Start everything; the services load side by side."""
        self.valkey.start()
        self.store, *self.more_stores = [self._spawn_store(FREE_PORTS) for _ in range(self.flags.num_stores)]
        for store in (self.store, *self.more_stores):
            store.wait_ready()
        with ThreadPoolExecutor() as pool:
            engine, gateway = pool.submit(self.start_engine), pool.submit(self._start_first_gateway)
            engine.result()
            gateway.result()
        self.wait_for_engine()

    def start_engine(self, *flags: str) -> ServiceProcess:
        """Start one more engine and wait until it is ready."""
        return self.spawn_engine(*flags).wait_ready()

    def spawn_engine(self, *flags: str) -> ServiceProcess:
        """Start one more engine, which is not ready yet."""
        common = ("--num-threads", "1", "--drain-settle-s", "0", "--redis-url", self.valkey.url, *ENGINE_FLAGS)
        peers = ("--store-target", self.store_target, "--metrics-port", "0")
        engine = self._spawn("loraplex_engine", (*FREE_PORTS, *common, *peers, *self.flags.engine, *flags))
        self.engines.append(engine)
        return engine

    def restart_store(self) -> None:
        """Start the store again on its ports; the old process must have ended."""
        self.store = self._started_again(self.store)

    def restart_another_store(self, index: int) -> None:
        """Start one of `more_stores` again on its ports; the old process must have ended."""
        self.more_stores[index] = self._started_again(self.more_stores[index])

    def _started_again(self, store: ServiceProcess) -> ServiceProcess:
        return self._spawn_store(("--port", store.grpc.rpartition(":")[2])).wait_ready()

    def stop(self) -> list[str]:
        """End everything and return the processes that did not end well."""
        troubles = []
        for process in (self.gateway, *self.engines, self.store, *self.more_stores):
            if process.is_running and (status := process.stop()) != 0:
                troubles.append(f"{process.log_path.stem} ended with {status}:\n{process.log()[-4000:]}")
        self.valkey.close()
        return troubles

    def client(self) -> AsyncClient:
        """Return a client of the gateway and the store."""
        return AsyncClient(self.gateway.grpc, store_target=self.store.grpc)

    def logs(self) -> str:
        """Return the end of every process's log."""
        files = sorted(self.log_dir.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def wait_for_engine(self) -> None:
        """Return once the gateway has found an engine; it looks for new ones from time to time."""
        deadline = time.monotonic() + FOUND_TIMEOUT_S
        with Client(self.gateway.grpc, store_target=self.store.grpc) as client:
            while True:
                try:
                    client.generate_once(prompt_token_ids=[5], max_new_tokens=1)
                except NoEngineError:
                    assert time.monotonic() < deadline, self.logs()
                    time.sleep(0.05)
                else:
                    return

    def start_gateway(self, *more: str, port: str = "0") -> ServiceProcess:
        """Start one more gateway, with more flags, and wait until it is ready; the caller ends it."""
        ports = ("--port", port, "--http-port", "0", "--metrics-port", "0")
        flags = ("--store-target", self.store_target, "--redis-url", self.valkey.url)
        gateway = self._spawn("loraplex_gateway", (*ports, *flags, "--drain-settle-s", "0", *self.flags.gateway, *more))
        return gateway.wait_ready()

    def _start_first_gateway(self) -> None:
        self.gateway = self.start_gateway()

    def _spawn_store(self, port: Sequence[str]) -> ServiceProcess:
        flags = ("--metrics-port", "0", "--import-root", str(self.import_root), "--redis-url", self.valkey.url)
        return self._spawn("loraplex_adapter_store", (*port, *flags, "--drain-settle-s", "0", *self.flags.store))

    def _spawn(self, module: str, flags: Sequence[str]) -> ServiceProcess:
        code = {} if self.flags.checkout is None else {"PYTHONPATH": python_path(self.flags.checkout)}
        return ServiceProcess(module, ["--model", str(self.model), *flags], log_dir=self.log_dir, environment=code)


def python_path(checkout: Path) -> str:
    """Return the ``PYTHONPATH`` with which a process runs a checkout's code."""
    return os.pathsep.join(str(checkout / each) for each in PACKAGES)


@contextmanager
def running_stack(directory: Path, model: Path, import_root: Path, flags: StackFlags | None = None) -> Iterator[Stack]:
    """Run a stack that ends with the block, and check that every process ends well.

    Args:
        directory: Empty; for logs and Valkey's data.
        model: Base model.
        import_root: Directory of PEFT adapter directories.
        flags: Further command-line flags.
    """
    valkey = EmbeddedValkey(directory / "valkey", max_memory_bytes=2**30)
    stack = Stack(model, import_root, directory, flags or StackFlags(), valkey)
    try:
        stack.start()
        yield stack
    except BaseException:
        print(stack.logs())
        for process in (
            *stack.engines,
            *stack.more_stores,
            *(getattr(stack, name, None) for name in ("gateway", "store")),
        ):
            if process is not None and process.is_running:
                process.kill()
        valkey.close()
        raise
    troubles = stack.stop()
    assert not troubles, "\n".join(troubles)


def read_metrics(process: ServiceProcess) -> dict[str, float]:
    """Return every sample of a service's /metrics; labels of a name are summed up."""
    with urllib.request.urlopen(f"http://{process.addresses['metrics']}/metrics", timeout=10) as page:
        text = page.read().decode()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


async def read_load(engine: ServiceProcess) -> engine_pb2.LoadReport:
    """Return an engine's load now."""
    async with open_channel(engine.grpc) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).WatchLoad(engine_pb2.WatchLoadRequest())
        async for response in call:
            call.cancel()
            return response.load
    raise AssertionError("the load stream ended without a reading")


async def assert_idle(engine: ServiceProcess) -> None:
    """Wait until an engine holds nothing for any request: no sequence, no lease, every page accounted for."""

    async def is_idle() -> bool:
        load = await read_load(engine)
        in_use = load.running + load.waiting + load.pages_kv + load.pages_pinned
        return in_use == 0 and load.pages_free + load.pages_adapter == load.pages_total

    await eventually(is_idle, what=f"{engine.log_path.stem} idle")
