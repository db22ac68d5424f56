"""An adapter store in a process of its own, with a Valkey, and an engine's side of the protocol in this process."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraplex_common.base_model import BaseModelInfo
from loraplex_common.grpc_channel import open_channel
from support.processes import ServiceProcess
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


PAGE_BYTES = 2 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a store is started with.

    Attributes:
        folder: Holds base model, adapters and logs.
        valkey_url: Its Valkey, password included.
        dtype: Compute dtype of the engine.
        num_slots: Pages of the engine's arena.
    """

    folder: Path
    base: BaseModelInfo
    valkey_url: str
    dtype: str
    num_slots: int


@asynccontextmanager
async def running_store(inputs: Inputs, *flags: str) -> AsyncIterator[tuple[StoreClient, int]]:
    """Run a store and give out a client, and its process id."""
    arguments = [
        "--model",
        str(inputs.folder / "base"),
        "--redis-url",
        inputs.valkey_url,
        "--port",
        "0",
        "--metrics-port",
        "0",
    ]
    arguments += ["--import-root", str(inputs.folder), "--log-level", "warning", *flags]
    process = ServiceProcess("loraplex_adapter_store", arguments, log_dir=inputs.folder)
    try:
        address = process.wait_ready().grpc
        async with open_channel(address) as channel:
            yield StoreClient(channel=channel), process.pid
    finally:
        await asyncio.to_thread(process.stop)


@asynccontextmanager
async def engine(client: StoreClient, inputs: Inputs, engine_id: str) -> AsyncIterator[EnginePeer]:
    """Attach an engine whose arena has been touched, as a real one's has."""
    geometry = inputs.base.geometry(dtype=inputs.dtype, page_bytes=PAGE_BYTES)
    peer = EnginePeer(inputs.base, geometry, inputs.num_slots, engine_id)
    peer.accept_unsolicited = False  # else what the store offers of itself would come before the clock starts
    peer.keeps_copies = False  # an engine hashes pages where they lie
    peer.touch_arena()
    try:
        async with attached_peer(client.channel, inputs.base, peer=peer):
            yield peer
    finally:
        peer.close()


class Fetched(NamedTuple):
    """What it took to bring images into an engine's arena.

    Attributes:
        seconds: From the first want until the last image was verified.
        cpu_s: Processor seconds of the store.
    """

    num_bytes: int
    seconds: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.num_bytes / self.seconds / 1e9


async def fetch(peer: EnginePeer, digests: Sequence[str], pid: int) -> Fetched:
    """Want images all at once and wait for all."""
    began, cpu_s = time.perf_counter(), cpu_seconds(pid)
    for digest in digests:
        peer.want(digest)
    for digest in digests:
        await peer.image(digest)
    seconds = time.perf_counter() - began
    return Fetched(sum(peer.num_bytes[digest] for digest in digests), seconds, cpu_seconds(pid) - cpu_s)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
