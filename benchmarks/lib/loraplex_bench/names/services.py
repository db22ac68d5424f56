"""A store and a gateway as processes of their own, and what they take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.grpc_channel import open_channel
from support.processes import ServiceProcess
from support.store_rig import StoreClient, translated

from loraplex_bench.store.rig import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FREE_PORTS = ("--port", "0", "--metrics-port", "0")
TABLE_S = 120.0
MAX_ASKED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A process that runs.

    Attributes:
        start_s: From its start until it was ready; a gateway with a store is ready once it has the whole table of names.
    """

    process: ServiceProcess
    start_s: float

    @property
    def rss_bytes(self) -> int:
        """Its memory that is resident."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken."""
        return cpu_seconds(self.process.pid)


@asynccontextmanager
async def service(module: str, folder: Path, valkey_url: str, *flags: str) -> AsyncIterator[Service]:
    """Run a service on free ports on the base model in ``folder / "base"``."""
    arguments = ["--model", str(folder / "base"), "--redis-url", valkey_url, *FREE_PORTS, *flags]
    began = time.perf_counter()
    process = ServiceProcess(module, arguments, log_dir=folder)
    try:
        await asyncio.to_thread(process.wait_ready)
        yield Service(process=process, start_s=time.perf_counter() - began)
    finally:
        await asyncio.to_thread(process.stop)


@asynccontextmanager
async def store(folder: Path, valkey_url: str) -> AsyncIterator[tuple[Service, StoreClient]]:
    """Run a store and connect to it."""
    async with (
        service("loraplex_adapter_store", folder, valkey_url, "--import-root", str(folder)) as running,
        open_channel(running.process.grpc) as channel,
    ):
        yield running, StoreClient(channel=channel)


@asynccontextmanager
async def gateway(folder: Path, valkey_url: str, store_target: str) -> AsyncIterator[Service]:
    """Run a gateway and wait until it has the whole table of names."""
    began = time.perf_counter()
    async with service(
        "loraplex_gateway", folder, valkey_url, "--http-port", "0", "--store-target", store_target
    ) as it:
        await asyncio.to_thread(_wait_for_table, it.process)
        yield Service(process=it.process, start_s=time.perf_counter() - began)


def _wait_for_table(process: ServiceProcess) -> None:
    deadline = time.perf_counter() + TABLE_S
    while "received the name table" not in process.log():
        if time.perf_counter() > deadline:
            raise TimeoutError(process.log())
        time.sleep(0.02)


async def whole_table(client: StoreClient) -> int:
    """Follow a store's names until the whole table has come; return how many there are.

    A store that has not read its table within five seconds says so; it is asked again, as gateways do.
    """
    for _ in range(MAX_ASKED):
        with contextlib.suppress(StoreUnavailableError), translated():
            return await _whole_table(client)
    raise TimeoutError("the store does not read its table of names")


async def _whole_table(client: StoreClient) -> int:
    call: Any = client.stub.WatchAliases(pb.WatchAliasesRequest(uses_text_parts=True), wait_for_ready=True)
    received = 0
    async for update in call:
        received += len(update.entries)
        if update.snapshot_end:
            break
    call.cancel()
    return received
