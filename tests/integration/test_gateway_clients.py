"""Clients go away, cancel, wait and stop reading; each ends its own request alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import collections
from typing import Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import (
    QueueTimeoutError,
    SaturatedError,
    SlowConsumerError,
)
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import running_gateway, text_request
from support.streams import failure_of, rest
from support.waiting import eventually

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest


async def test_a_client_that_goes_away_frees_everything(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2
        call = rig.stub.Generate(text_request(request_id="gone"))
        await call.read()

        call.cancel()

        await rig.engine.wait_for(lambda: rig.engine.aborted_ids == ["gone"])
        await eventually(lambda: rig.app.claims.num_running == 0 and rig.app.admission.num_running == 0)
        rig.check_idle()
        rig.engine.release()
        assert await rig.stub.GenerateOnce(Once(request=text_request(request_id="gone")))


async def test_a_deadline_ends_the_request_on_the_engine(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(Once(request=text_request()), timeout=0.5)

        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await rig.engine.wait_for(lambda: len(rig.engine.aborted_ids) == 1)


async def test_cancel_request_ends_the_stream_with_what_there_is(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 3
        call = rig.stub.Generate(text_request(request_id="mine"))
        responses: list[Any] = [await call.read(), await call.read()]

        answer = await rig.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id="mine"))
        responses += await rest(call)

        assert answer.was_running
        assert responses[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
        await rig.engine.wait_for(lambda: rig.engine.aborted_ids == ["mine"])
        answer = await rig.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id="mine"))
        assert not answer.was_running


async def test_cancel_request_reaches_a_request_that_still_waits(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_concurrent_requests=1) as rig:
        rig.engine.hold_at = 1
        running = rig.stub.Generate(text_request())
        await running.read()
        waiting = rig.stub.Generate(text_request(request_id="waits", progress_events=True))
        accepted: Any = await waiting.read()
        assert accepted.HasField("accepted")
        queued: Any = await waiting.read()
        assert queued.queued.position == 0

        await rig.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id="waits"))

        assert (await rest(waiting))[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
        running.cancel()


async def test_a_full_gateway_sheds_with_a_retry_time(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_concurrent_requests=1, max_queued_requests=1) as rig:
        rig.engine.hold_at = 1
        running = rig.stub.Generate(text_request())
        await running.read()
        queued = rig.stub.Generate(text_request(progress_events=True))
        await queued.read()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(Once(request=text_request()))
        error = error_from_rpc(caught.value)
        assert isinstance(error, SaturatedError)
        assert error.retry_after_s
        assert error.drop_reason == "rejected-saturated"

        rig.engine.release()
        assert (await rest(queued))[-1].HasField("finished")
        assert (await rest(running))[-1].HasField("finished")
        rig.check_idle()


async def test_queue_timeout_ends_a_request_that_waits_here(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_concurrent_requests=1) as rig:
        rig.engine.hold_at = 1
        running = rig.stub.Generate(text_request())
        await running.read()
        request = text_request()
        request.queue_timeout.FromMilliseconds(100)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(Once(request=request))
        error = error_from_rpc(caught.value)
        assert isinstance(error, QueueTimeoutError)
        assert error.drop_reason == "rejected-ttl-expired"
        running.cancel()


async def test_a_client_that_stops_reading_ends_only_its_own_stream(valkey_url: str) -> None:
    big = [383] * 100_000  # the longest tokens there are, and far more than any window holds

    async with running_gateway(valkey_url, reply=lambda submit: big, max_buffered_tokens=200) as rig:
        rig.engine.max_model_len = 200_000
        await rig.engine.register(rig.valkey)
        await eventually(lambda: rig.app.pool.links[0].record.max_model_len == 200_000)
        rig.engine.tokens_per_message = 50
        options = gateway_pb2.ResponseOptions(logprobs=20)
        lazy = rig.stub.Generate(
            text_request(
                stopping=gateway_pb2.StoppingParams(max_new_tokens=100_000), response_options=options, request_id="lazy"
            )
        )
        await lazy.read()

        await rig.engine.wait_for(lambda: rig.engine.aborted_ids == ["lazy"], timeout_s=60)
        ok = await rig.stub.GenerateOnce(Once(request=text_request()), timeout=20)

        assert ok.finished.usage.output_tokens == 8
        assert isinstance(await failure_of(lazy), SlowConsumerError)


async def test_a_client_that_never_reads_again_is_given_up(valkey_url: str) -> None:
    big = [383] * 3_000

    async with running_gateway(
        valkey_url, reply=lambda submit: big, slow_client_s=0.3, max_buffered_tokens=10**6
    ) as rig:
        rig.engine.max_model_len = 200_000
        await rig.engine.register(rig.valkey)
        await eventually(lambda: rig.app.pool.links[0].record.max_model_len == 200_000)
        rig.engine.tokens_per_message = 50
        lazy = rig.stub.Generate(
            text_request(
                stopping=gateway_pb2.StoppingParams(max_new_tokens=3_000),
                response_options=gateway_pb2.ResponseOptions(logprobs=20),
            )
        )
        await lazy.read()

        await eventually(lambda: rig.app.admission.num_running == 1)
        await eventually(lambda: rig.app.admission.num_running == 0, timeout_s=60)

        rig.check_idle()
        lazy.cancel()


async def test_thousands_of_queued_requests_end_well(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_concurrent_requests=64, max_queued_requests=500) as rig:
        rig.engine.hold_at = 1
        outcomes: collections.Counter[str] = collections.Counter()

        async def one() -> None:
            try:
                await rig.stub.GenerateOnce(Once(request=text_request()), timeout=60)
                outcomes["ok"] += 1
            except grpc.aio.AioRpcError as failure:
                outcomes[type(error_from_rpc(failure)).__name__] += 1

        calls = [asyncio.create_task(one()) for _ in range(2000)]
        await eventually(lambda: outcomes["SaturatedError"] == 2000 - 564, timeout_s=30)
        rig.engine.release()
        await asyncio.gather(*calls)

        assert outcomes == {"ok": 564, "SaturatedError": 2000 - 564}
        rig.check_idle()
