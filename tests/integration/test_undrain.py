"""Undrain: an engine that was drained takes requests again, and the registry and the callers of Drain are told."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_client import AsyncClient, Client
from loraplex_common import valkey
from loraplex_common.errors import ConflictError, DrainingError, LoraplexError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.registry import RegistryReader
from loraplex_common.rpc_errors import error_from_rpc
from support.engine_sessions import EngineSessionClient
from support.lone_engine import PROMPT, running_engine
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.processes import ServiceProcess

Stub: TypeAlias = "engine_pb2_grpc.EngineServiceAsyncStub"


@asynccontextmanager
async def engine_and_session(
    directory: Path, *flags: str
) -> AsyncIterator[tuple[ServiceProcess, Stub, EngineSessionClient]]:
    with running_engine(directory, *flags) as process:
        async with open_channel(process.grpc) as channel, EngineSessionClient(process.grpc) as session:
            yield process, engine_pb2_grpc.EngineServiceStub(channel), session


async def failure_of(call: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def drain_request(seconds: int) -> engine_pb2.DrainRequest:
    return engine_pb2.DrainRequest(deadline=duration_pb2.Duration(seconds=seconds))


async def undrain(stub: Stub) -> bool:
    return (await stub.Undrain(engine_pb2.UndrainRequest())).was_draining


async def test_an_engine_whose_drain_is_over_takes_requests_again(tmp_path: Path) -> None:
    async with engine_and_session(tmp_path) as (_, stub, session):
        await stub.Drain(drain_request(0))
        assert isinstance(await session.fail(await session.submit(0, PROMPT)), DrainingError)

        assert await undrain(stub)

        assert len(await session.finish(await session.submit(1, PROMPT, 8))) == 8
        assert not await undrain(stub), "there was nothing left to undo"
        assert (await stub.Drain(drain_request(0))).num_ended == 0, "and what an earlier drain ended does not count"


async def test_undrain_ends_a_drain_under_way_and_no_request(tmp_path: Path) -> None:
    async with engine_and_session(tmp_path) as (_, stub, session):
        running = await session.submit(0, PROMPT, 480)
        await asyncio.wait_for(running.has_tokens.wait(), 20)
        drains = [asyncio.create_task(failure_of(stub.Drain(drain_request(60)))) for _ in range(2)]
        await eventually(lambda: is_draining(stub), timeout_s=20)

        undone = await asyncio.gather(undrain(stub), undrain(stub))

        assert sorted(undone) == [False, True], "of two callers at once one has undone it"
        for error in await asyncio.gather(*drains):
            assert isinstance(error, ConflictError)
            assert "Undrain" in error.message
        assert len(await session.finish(await session.submit(1, PROMPT, 8))) == 8
        assert len(await session.finish(running)) == 480


async def is_draining(stub: Stub) -> bool:
    async for response in stub.WatchLoad(engine_pb2.WatchLoadRequest()):
        return response.load.draining
    raise AssertionError("no reading")


async def test_the_registry_says_whether_an_engine_drains(tmp_path: Path, valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    registry = RegistryReader(client)

    async def drains() -> bool:
        (record,) = (await registry.read()).values()
        return record.is_draining

    async with engine_and_session(tmp_path, "--redis-url", valkey_url) as (_, stub, _session):
        before = await drains()
        await stub.Drain(drain_request(0))
        drained = await drains()
        await undrain(stub)

        assert (before, drained, await drains()) == (False, True, False)
    await client.aclose()


async def test_an_engine_whose_process_ends_is_not_undrained(tmp_path: Path) -> None:
    async with engine_and_session(tmp_path) as (process, stub, session):
        running = await session.submit(0, PROMPT, 480)
        await asyncio.wait_for(running.has_tokens.wait(), 20)
        stopping = asyncio.create_task(asyncio.to_thread(process.stop))
        await eventually(lambda: is_draining(stub), timeout_s=20)

        error = await failure_of(stub.Undrain(engine_pb2.UndrainRequest()))

        assert isinstance(error, DrainingError)
        assert "start it again" in error.message
        assert len(await session.finish(running)) == 480
        assert await stopping == 0


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_client_drains_and_undrains(tmp_path: Path, is_async: bool) -> None:
    with running_engine(tmp_path) as process:
        if is_async:
            async with AsyncClient() as client:
                assert await client.engines.drain(process.grpc, deadline_s=0) == 0
                assert await client.engines.undrain(process.grpc)
                assert not await client.engines.undrain(process.grpc)
        else:
            with Client() as blocking:
                assert blocking.engines.drain(process.grpc, deadline_s=0) == 0
                assert blocking.engines.undrain(process.grpc)
                assert not blocking.engines.undrain(process.grpc)
                with pytest.raises(LoraplexError):
                    blocking.engines.undrain("127.0.0.1:1")
