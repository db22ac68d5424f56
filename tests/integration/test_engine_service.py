"""The engine process on its own, as a gateway sees it: sessions, single calls, metrics, and its end."""

from __future__ import annotations

import asyncio
import urllib.request
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_common.errors import (
    AdapterNotFoundError,
    DrainingError,
    InvalidParameterError,
    LoraplexError,
    SequenceGapError,
)
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.engine_sessions import EngineSessionClient, make_submit
from support.lone_engine import DIGEST, LENGTH, PROMPT, is_idle, running_engine
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from support.processes import ServiceProcess

pytestmark = pytest.mark.integration

NO_READING_AHEAD = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
"""Options of a channel that reads 64 KiB ahead of its caller; by default it reads more where more arrives."""


async def failure_of(call: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def metrics(engine: ServiceProcess) -> str:
    with urllib.request.urlopen(f"http://{engine.addresses['metrics']}/metrics", timeout=10) as page:
        return str(page.read().decode())


def metric(engine: ServiceProcess, name: str) -> float:
    (line,) = [line for line in metrics(engine).splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return float(line.split()[-1])


async def drain_stream(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_session_begins_with_a_snapshot_and_the_load(session: EngineSessionClient) -> None:
    await eventually(lambda: session.num_messages >= 1)

    assert session.loads[0].pages_total == session.loads[0].pages_free > 0


async def test_the_load_is_reported_every_second_when_nothing_happens(session: EngineSessionClient) -> None:
    await eventually(lambda: session.num_messages >= 3, timeout_s=5)


async def test_a_second_use_of_a_running_slot_ends_the_session(
    engine: ServiceProcess, session: EngineSessionClient, stub: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    async with EngineSessionClient(engine.grpc) as broken:
        await broken.submit(0, PROMPT, 400)
        await broken.submit(0, PROMPT, 400)
        await asyncio.wait_for(broken.is_over.wait(), 20)

    assert broken.failure is not None
    assert broken.failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(await session.finish(await session.submit(0, PROMPT))) == 8
    await eventually(lambda: is_idle(stub))


async def test_a_session_without_a_hello_is_refused(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    call = stub.Session()
    await call.write(engine_pb2.SessionRequest(aborts=[engine_pb2.Abort(slot=0)]))

    async def read() -> None:
        async for _ in call:
            pass

    error = await failure_of(read())
    assert isinstance(error, InvalidParameterError)
    assert error.field == "hello"


async def test_a_second_hello_is_refused(session: EngineSessionClient) -> None:
    await session.send(engine_pb2.SessionRequest(hello=engine_pb2.SessionRequest.Hello(gateway_id="again")))

    await asyncio.wait_for(session.is_over.wait(), 20)
    assert session.failure is not None
    assert session.failure.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_requests_go_on_for_a_moment_after_the_input_is_closed(
    session: EngineSessionClient, stub: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    short = await session.submit(0, PROMPT, 3)
    endless = await session.submit(1, PROMPT, 500)
    await session.close_input()

    await session.finish(short)
    await session.finish(endless)
    await asyncio.wait_for(session.is_over.wait(), 20)

    assert short.finish is not None
    assert short.finish.finish_reason == LENGTH
    assert session.failure is None
    await eventually(lambda: is_idle(stub))


async def test_a_lost_session_frees_everything(
    engine: ServiceProcess, stub: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    async with EngineSessionClient(engine.grpc) as lost:
        outcomes = [await lost.submit(slot, PROMPT, 500) for slot in range(4)]
        await asyncio.wait_for(outcomes[0].has_tokens.wait(), 20)

    await eventually(lambda: is_idle(stub))


async def test_the_engine_describes_itself(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    info = await stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest())

    assert len(info.engine_id) == 32
    assert (info.base_model.name, info.base_model.vocab_size, info.base_model.max_model_len) == ("tiny", 384, 512)
    assert info.geometry.dtype == "float32"
    assert info.num_pages * info.geometry.page_bytes == 2 * 2**20
    assert (info.backend, list(info.api_revisions)) == ("torch", ["v1"])
    assert "q_proj" in info.target_modules


async def test_there_are_no_adapters_to_list_pin_or_evict(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    listed = await stub.ListAdapters(engine_pb2.ListAdaptersRequest())

    assert not listed.adapters
    for call in (
        stub.PinAdapter(engine_pb2.PinAdapterRequest(digest=DIGEST)),
        stub.UnpinAdapter(engine_pb2.UnpinAdapterRequest(digest=DIGEST)),
        stub.EvictAdapter(engine_pb2.EvictAdapterRequest(digest=DIGEST)),
    ):
        assert isinstance(await failure_of(call), AdapterNotFoundError)


async def test_bad_pages_and_positions_are_refused(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    error = await failure_of(stub.ListAdapters(engine_pb2.ListAdaptersRequest(page_size=-1)))
    assert isinstance(error, InvalidParameterError)

    async def watch() -> None:
        async for _ in stub.WatchAdapters(engine_pb2.WatchAdaptersRequest(start_sequence=10**6)):
            pass

    assert isinstance(await failure_of(watch()), SequenceGapError)


async def test_requests_are_counted(engine: ServiceProcess, session: EngineSessionClient) -> None:
    before = metric(engine, "vllm:generation_tokens_total")

    await session.finish(await session.submit(0, PROMPT, 8))

    assert metric(engine, "vllm:generation_tokens_total") == before + 8
    labels = 'engine="0",finished_reason="length",model_name="tiny"'
    assert f"vllm:request_success_total{{{labels}}}" in metrics(engine)
    assert metrics(engine).count("\nvllm:lora_requests_info{") == 1


@pytest.mark.parametrize(("deadline_s", "num_ended"), [(60, 0), (0, 1)])
async def test_a_drain_waits_for_running_requests_until_its_deadline(
    tmp_path: Path, deadline_s: int, num_ended: int
) -> None:
    async with AsyncExitStack() as stack:
        process = stack.enter_context(running_engine(tmp_path))
        session = await stack.enter_async_context(EngineSessionClient(process.grpc))
        stub = engine_pb2_grpc.EngineServiceStub(await stack.enter_async_context(open_channel(process.grpc)))
        outcome = await session.submit(1, PROMPT, 500)
        await asyncio.wait_for(outcome.has_tokens.wait(), 20)

        deadline = duration_pb2.Duration(seconds=deadline_s)
        response = await stub.Drain(engine_pb2.DrainRequest(deadline=deadline))
        refused = await session.fail(await session.submit(2, PROMPT))

        if num_ended:
            assert isinstance(await session.fail(outcome), DrainingError)
        else:
            assert len(await session.finish(outcome)) == 500
        assert response.num_ended == num_ended
        assert isinstance(refused, DrainingError)


async def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    with running_engine(tmp_path) as process:
        async with EngineSessionClient(process.grpc) as session:
            outcome = await session.submit(0, PROMPT, 200)
            await asyncio.wait_for(outcome.has_tokens.wait(), 20)

            status = await asyncio.to_thread(process.stop)

            assert len(await session.finish(outcome)) == 200
    assert status == 0


async def test_a_gateway_that_does_not_read_loses_its_session_and_nobody_else_notices(tmp_path: Path) -> None:
    limits = ("--outbox-max-bytes", "64KiB", "--outbox-max-age-s", "2", "--max-num-seqs", "16")
    async with AsyncExitStack() as stack:
        process = stack.enter_context(running_engine(tmp_path, *limits))
        channel = await stack.enter_async_context(open_channel(process.grpc))
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        deaf_channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.grpc, NO_READING_AHEAD))
        deaf = engine_pb2_grpc.EngineServiceStub(deaf_channel).Session()
        await deaf.write(engine_pb2.SessionRequest(hello=engine_pb2.SessionRequest.Hello(gateway_id="deaf")))
        submits = [make_submit(slot, PROMPT, 480, logprobs=20) for slot in range(48)]
        await deaf.write(engine_pb2.SessionRequest(submits=submits))
        session = await stack.enter_async_context(EngineSessionClient(process.grpc))

        tokens = await session.finish(await session.submit(0, PROMPT, 8), timeout_s=60)

        await eventually(lambda: is_idle(stub), timeout_s=60)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await asyncio.wait_for(drain_stream(deaf), 60)
    assert len(tokens) == 8
