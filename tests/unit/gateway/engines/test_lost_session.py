"""A session that its engine ends leaves nothing behind on the event loop, with keys and without."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from grpc import aio
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.registry import EngineRecord
from loraplex_gateway.engines.link import EngineLink
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NUM_LOST = 4


class FailingEngine(engine_pb2_grpc.EngineServiceServicer):
    """Welcomes each gateway and ends its session at once."""

    def __init__(self) -> None:
        self.num_sessions = 0

    async def Session(  # noqa: N802
        self, requests: AsyncIterator[engine_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        """Serve one gateway for a moment."""
        await anext(requests)
        self.num_sessions += 1
        yield engine_pb2.SessionResponse(
            welcome=engine_pb2.SessionResponse.Welcome(engine_id="e1", base_fingerprint="00" * 32)
        )


@pytest.mark.parametrize("key", [None, "secret"], ids=["without a key", "with a key"])
async def test_a_session_that_the_engine_ends_leaves_no_task_to_be_destroyed(key: str | None) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
    server, engine = aio.server(), FailingEngine()  # type: ignore[abstract] # one RPC of many
    port = server.add_insecure_port("127.0.0.1:0")
    engine_pb2_grpc.add_EngineServiceServicer_to_server(engine, server)
    await server.start()
    record = EngineRecord(
        engine_id="e1",
        target=f"127.0.0.1:{port}",
        base_model="tiny",
        base_fingerprint="00" * 32,
        max_model_len=512,
        vocab_size=384,
        num_pages=64,
        block_tokens=16,
        page_bytes=65536,
        max_image_pages=32,
    )
    link = EngineLink(
        record, gateway_id="g", max_buffered_tokens=9, on_change=lambda: None, dial=partial(open_channel, api_key=key)
    )

    task = asyncio.create_task(link.run())
    await eventually(lambda: engine.num_sessions >= NUM_LOST)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop(None)
    gc.collect()  # what nothing refers to any more is destroyed here ...
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # ... and its generators are closed by tasks that fail here
    gc.collect()

    assert [what["message"] for what in told] == []
