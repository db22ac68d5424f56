"""A stream that the store ends leaves nothing behind on the engine's event loop."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpc import aio
from loraplex.v1 import adapter_store_pb2_grpc
from support.adapter_line import ScriptedStore, close, make_line
from support.base_models import write_base_model
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

NUM_LOST = 3


@dataclass(frozen=True)
class Served:
    """A server and its port."""

    server: aio.Server
    port: int


async def served(store: ScriptedStore, port: int = 0) -> Served:
    """Start a server of the store's."""
    server = aio.server()
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
    await server.start()
    return Served(server, port)


async def test_a_stream_that_the_store_ends_leaves_no_task_to_be_destroyed(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
    store = ScriptedStore()  # type: ignore[abstract]  # one RPC of many
    server = await served(store)
    line = make_line(write_base_model(tmp_path / "tiny"), f"127.0.0.1:{server.port}", store, wait_s=60.0)
    task = asyncio.create_task(line.client.run())
    for _ in range(NUM_LOST):
        await eventually(lambda: line.client.is_attached)
        await server.server.stop(None)
        await eventually(lambda: not line.client.is_attached)
        server = await served(store, server.port)
    gc.collect()  # what nothing refers to any more is destroyed here ...
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # ... and its generators are closed by tasks that fail here
    gc.collect()
    await close(line, task)
    await server.server.stop(None)

    assert [what["message"] for what in told] == []
