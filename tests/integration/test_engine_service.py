"""The engine process on its own, as a gateway sees it: sessions of base-model requests."""

from __future__ import annotations

import asyncio
import math
import urllib.request
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2
from loraplex_common.errors import (
    AdapterNotFoundError,
    DeadlineError,
    DrainingError,
    InvalidParameterError,
    LoraplexError,
    RequestTooLargeError,
    SequenceGapError,
    StoreUnavailableError,
)
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.base_models import TinyBase, write_base_model
from support.engine_sessions import EngineSessionClient, make_submit
from support.processes import ServiceProcess
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

PROMPT = [5, 6, 7, 8, 9]
DIGEST = "ab" * 32
LENGTH = gateway_pb2.FINISH_REASON_LENGTH


@contextmanager
def running_engine(directory: Path, *flags: str) -> Iterator[ServiceProcess]:
    """Run an engine that ends with the block: in order if the block has not ended it, at once if the block failed."""
    model = directory / "tiny"
    if not model.exists():
        write_base_model(model, TinyBase())
    sizes = ("--pool-bytes", "2MiB", "--arena-bytes", "2MiB", "--num-threads", "1", "--drain-settle-s", "0")
    arguments = ["--model", str(model), "--port", "0", "--metrics-port", "0", *sizes, *flags]
    process = ServiceProcess("loraplex_engine", arguments, log_dir=directory).wait_ready()
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    assert not process.is_running or process.stop() == 0, process.log()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running_engine(tmp_path_factory.mktemp("engine"), "--session-grace-s", "0.2") as process:
        yield process


@pytest.fixture
async def session(engine: ServiceProcess) -> AsyncIterator[EngineSessionClient]:
    async with EngineSessionClient(engine.grpc) as client:
        yield client


@pytest.fixture
async def stub(engine: ServiceProcess) -> AsyncIterator[engine_pb2_grpc.EngineServiceAsyncStub]:
    async with open_channel(engine.grpc) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


async def failure_of(call: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def metrics(engine: ServiceProcess) -> str:
    with urllib.request.urlopen(f"http://{engine.addresses['metrics']}/metrics", timeout=10) as page:
        return str(page.read().decode())


def metric(engine: ServiceProcess, name: str) -> float:
    (line,) = [line for line in metrics(engine).splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


async def drain_stream(call: Any) -> None:
    async for _ in call:
        pass


async def is_idle(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> bool:
    async for response in stub.WatchLoad(engine_pb2.WatchLoadRequest()):
        load = response.load
        return load.running == load.waiting == 0 and load.pages_free == load.pages_total
    return False


async def test_a_session_begins_with_a_snapshot_and_the_load(session: EngineSessionClient) -> None:
    await eventually(lambda: session.num_messages >= 1)

    assert session.loads[0].pages_total == session.loads[0].pages_free > 0


async def test_the_load_is_reported_every_second_when_nothing_happens(session: EngineSessionClient) -> None:
    await eventually(lambda: session.num_messages >= 3, timeout_s=5)


async def test_a_request_runs_to_its_length(session: EngineSessionClient) -> None:
    outcome = await session.submit(0, PROMPT, max_new_tokens=8)

    tokens = await session.finish(outcome)

    assert len(tokens) == 8
    assert outcome.first_sequence == 0
    assert outcome.started is not None
    assert outcome.finish is not None
    assert outcome.finish.finish_reason == LENGTH
    assert outcome.finish.timings.prefill.ToNanoseconds() > 0


async def test_a_slot_is_free_again_after_the_end(session: EngineSessionClient) -> None:
    first = await session.finish(await session.submit(4, PROMPT))

    second = await session.finish(await session.submit(4, PROMPT))

    assert first == second


async def test_a_batch_gives_what_each_request_gives_alone(session: EngineSessionClient) -> None:
    prompts = [[10 + n, 20 + n, 30 + 2 * n] * (n + 1) for n in range(12)]
    alone = [await session.finish(await session.submit(0, prompt, 12)) for prompt in prompts]

    outcomes = [await session.submit(100 + n, prompt, 12) for n, prompt in enumerate(prompts)]
    together = [await session.finish(outcome) for outcome in outcomes]

    assert together == alone


async def test_a_resumed_request_continues_where_it_was_cut(session: EngineSessionClient) -> None:
    whole = await session.finish(await session.submit(0, PROMPT, 10))

    outcome = await session.submit(1, PROMPT, 10, resumed_token_ids=whole[:4])
    rest = await session.finish(outcome)

    assert (outcome.first_sequence, rest) == (4, whole[4:])


async def test_a_seed_decides_what_is_drawn(session: EngineSessionClient) -> None:
    async def draw(slot: int, seed: int) -> list[int]:
        sampling = gateway_pb2.SamplingParams(temperature=1.0, seed=seed)
        return await session.finish(await session.submit(slot, PROMPT, 16, sampling=sampling))

    first, again, other = await asyncio.gather(draw(1, 42), draw(2, 42), draw(3, 43))

    assert first == again != other


async def test_a_stop_token_ends_the_output_and_is_part_of_it(session: EngineSessionClient) -> None:
    tokens = await session.finish(await session.submit(0, PROMPT, 10))
    stop = tokens[3]
    stopping = gateway_pb2.StoppingParams(max_new_tokens=10, stop_token_ids=[stop], ignore_eos=True)

    outcome = await session.submit(1, PROMPT, stopping=stopping)

    assert await session.finish(outcome) == tokens[: tokens.index(stop) + 1]
    assert outcome.finish is not None
    assert (outcome.finish.finish_reason, outcome.finish.stop_token_id) == (gateway_pb2.FINISH_REASON_STOP, stop)


async def test_probabilities_come_with_the_tokens_and_the_prompts_with_the_start(session: EngineSessionClient) -> None:
    outcome = await session.submit(0, PROMPT, 4, logprobs=2, prompt_logprobs=1)

    tokens = await session.finish(outcome)

    assert [entry.chosen.token_id for entry in outcome.logprobs] == tokens
    assert all(entry.top[0].token_id == entry.chosen.token_id and len(entry.top) == 2 for entry in outcome.logprobs)
    assert all(entry.top[0].logprob <= 0 for entry in outcome.logprobs)
    assert outcome.started is not None
    assert [entry.chosen.token_id for entry in outcome.started.prompt_logprobs] == PROMPT[1:]


async def test_an_aborted_request_ends_as_cancelled_and_frees_its_pages(
    session: EngineSessionClient, stub: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    outcome = await session.submit(0, PROMPT, 400)
    await asyncio.wait_for(outcome.has_tokens.wait(), 20)

    await session.abort(0)
    await session.finish(outcome)

    assert outcome.finish is not None
    assert outcome.finish.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
    await eventually(lambda: is_idle(stub))


async def test_an_abort_of_an_unknown_slot_disturbs_nobody(session: EngineSessionClient) -> None:
    await session.abort(77)

    assert len(await session.finish(await session.submit(0, PROMPT))) == 8


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 600}, "prompt_token_ids"),
        ({"prompt_token_ids": [384]}, "prompt_token_ids[0]"),
        ({"sampling": gateway_pb2.SamplingParams(seed=1, temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": gateway_pb2.SamplingParams(seed=1, top_p=7.0)}, "sampling.top_p"),
        ({"stopping": gateway_pb2.StoppingParams(max_new_tokens=0)}, "stopping.max_new_tokens"),
        ({"adapter_digest": "no digest"}, "adapter_digest"),
    ],
)
async def test_a_bad_field_ends_its_own_request_only(
    session: EngineSessionClient, fields: dict[str, Any], field: str
) -> None:
    neighbour = await session.submit(1, PROMPT, 20)

    error = await session.fail(await session.submit(2, **({"prompt": PROMPT} | fields)))

    assert isinstance(error, InvalidParameterError)
    assert error.field == field
    assert len(await session.finish(neighbour)) == 20


async def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    sizes = ("--pool-bytes", "131072", "--arena-bytes", "131072")
    with running_engine(tmp_path, *sizes) as process:
        async with EngineSessionClient(process.grpc) as session:
            error = await session.fail(await session.submit(0, PROMPT, 500))
            tokens = await session.finish(await session.submit(1, PROMPT, 8))

    assert isinstance(error, RequestTooLargeError)
    assert "pages" in error.message
    assert len(tokens) == 8


async def test_a_deadline_that_has_passed_fails_the_request(session: EngineSessionClient) -> None:
    error = await session.fail(await session.submit(0, PROMPT, time_left=duration_pb2.Duration(seconds=0)))

    assert isinstance(error, DeadlineError)


async def test_a_time_limit_ends_the_output_normally(session: EngineSessionClient) -> None:
    outcome = await session.submit(0, PROMPT, 400, time_limit=duration_pb2.Duration(nanos=50_000_000))

    tokens = await session.finish(outcome)

    assert outcome.finish is not None
    assert outcome.finish.finish_reason in (gateway_pb2.FINISH_REASON_TIME_LIMIT, LENGTH)
    assert len(tokens) <= 400


async def test_an_adapter_without_a_store_is_unavailable(session: EngineSessionClient) -> None:
    error = await session.fail(await session.submit(0, PROMPT, adapter_digest=DIGEST))

    assert isinstance(error, StoreUnavailableError)


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
    assert 'vllm:request_success_total{finished_reason="length"}' in metrics(engine)
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
        deaf = stub.Session()
        await deaf.write(engine_pb2.SessionRequest(hello=engine_pb2.SessionRequest.Hello(gateway_id="deaf")))
        submits = [make_submit(slot, PROMPT, 480, logprobs=20) for slot in range(48)]
        await deaf.write(engine_pb2.SessionRequest(submits=submits))
        session = await stack.enter_async_context(EngineSessionClient(process.grpc))

        tokens = await session.finish(await session.submit(0, PROMPT, 8), timeout_s=60)

        await eventually(lambda: is_idle(stub), timeout_s=60)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await drain_stream(deaf)
    assert len(tokens) == 8
