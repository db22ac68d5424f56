"""Engines, the store and Valkey go away; streams end as the contract says, and nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.auth import ANYBODY
from loraplex_common.errors import (
    AdapterLoadingError,
    DrainingError,
    EngineHungError,
    EngineOomError,
    NoEngineError,
    StoreUnavailableError,
    StreamInterruptedError,
)
from loraplex_common.ids import new_request_id
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_common.secret import Secret
from loraplex_common.valkey import EmbeddedValkey
from loraplex_gateway.engines import liveness
from support.gateway_rig import DIGEST, Rig, letters, running_gateway, text_request
from support.streams import failure_of, rest
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest


def tokens_of(responses: list[gateway_pb2.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.chunk.token_ids]


async def test_another_engine_continues_what_a_dead_one_began(valkey_url: str) -> None:
    request = text_request(adapter="poet", stopping=gateway_pb2.StoppingParams(max_new_tokens=20))
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.hold_at = 7
        call = rig.stub.Generate(request)
        responses: list[Any] = [await call.read()]
        while len(tokens_of(responses)) < 7:
            responses.append(await call.read())
        first = next(engine for engine in rig.engines if engine.submits)
        second = next(engine for engine in rig.engines if engine is not first)
        second.release()

        await first.kill()
        responses += await rest(call)

        (resumed,) = second.submits
        (original,) = first.submits
        assert tokens_of(responses) == list(letters(original))
        assert list(resumed.resumed_token_ids) == list(letters(original))[:7]
        assert (resumed.adapter_digest, resumed.sampling.seed) == (DIGEST, original.sampling.seed)
        assert [r.WhichOneof("event") for r in responses].count("started") == 1
        indices = [response.chunk.index for response in responses if response.HasField("chunk")]
        assert indices == sorted(set(indices))
        assert responses[-1].finished.usage.output_tokens == 20
        rig.check_idle()


@pytest.mark.parametrize("stop_strings", [[], ["m"]], ids=["to its length", "to a stop string"])
async def test_a_stream_that_another_engine_continues_is_counted_once_it_ends(
    valkey_url: str, stop_strings: list[str]
) -> None:
    stopping = gateway_pb2.StoppingParams(max_new_tokens=20, stop_strings=stop_strings)
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.gives_up_at = {7: DrainingError("draining")}

        responses = await rest(rig.stub.Generate(text_request(stopping=stopping)))

        assert responses[-1].HasField("finished")
        await eventually(lambda: _resumes(rig) == {"ok": 1.0})


def _resumes(rig: Rig) -> dict[str, float]:
    """Return how many interrupted streams there were, by what became of them."""
    (family,) = rig.app.metrics.resumes.collect()
    totals = [each for each in family.samples if each.name.endswith("_total")]
    return {each.labels["outcome"]: each.value for each in totals if each.value}


@pytest.mark.parametrize("tokens_per_message", [1, 7], ids=["later", "with the start"])
async def test_no_token_is_lost_when_an_engine_gives_up_a_request_with_it(
    valkey_url: str, tokens_per_message: int
) -> None:
    request = text_request(
        stopping=gateway_pb2.StoppingParams(max_new_tokens=20), response_options=gateway_pb2.ResponseOptions(logprobs=1)
    )
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.gives_up_at, engine.tokens_per_message = {7: DrainingError("draining")}, tokens_per_message

        responses = await rest(rig.stub.Generate(request))

        original, resumed = (submit for engine in rig.engines for submit in engine.submits)
        assert max(len(original.resumed_token_ids), len(resumed.resumed_token_ids)) == 7
        chunks = [response.chunk for response in responses if response.HasField("chunk")]
        assert tokens_of(responses) == list(letters(original))
        assert [entry.chosen.token_id for chunk in chunks for entry in chunk.logprobs] == tokens_of(responses)
        assert [chunk.index for chunk in chunks] == list(accumulate((len(c.token_ids) for c in chunks[:-1]), initial=0))
        assert [r.WhichOneof("event") for r in responses].count("started") == 1
        rig.check_idle()


async def test_without_another_engine_the_stream_is_interrupted(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.3) as rig:
        rig.engine.hold_at = 3
        call = rig.stub.Generate(text_request())
        await call.read()
        await call.read()
        await rig.engine.kill()

        assert isinstance(await failure_of(call), StreamInterruptedError)
        rig.check_idle()


async def test_an_engine_that_registers_in_time_takes_over(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=1) as rig, running_gateway(valkey_url, num_engines=0) as spare:
        rig.engine.hold_at = 3
        call = rig.stub.Generate(text_request())
        await call.read()
        await rig.engine.kill()
        new = type(rig.engine)(base=rig.engine.base, reply=letters)
        await new.start()
        await new.register(spare.valkey)

        responses = await rest(call)

        await new.kill()
        assert responses[-1].HasField("finished")
        assert len(new.submits) == 1


OUTAGE = StoreUnavailableError("the store cannot read the adapter", retry_after_s=1.0)


async def _moved_into_an_outage(rig: Rig, request: gateway_pb2.GenerateRequest) -> tuple[Any, list[Any], Any]:
    """Return a stream of three tokens, those tokens, and the engine that cannot get its adapter now that its own is dead."""
    for engine in rig.engines:
        engine.hold_at = 3
    call = rig.stub.Generate(request)
    responses: list[Any] = []
    while len(tokens_of(responses)) < 3:
        responses.append(await call.read())
    first = next(engine for engine in rig.engines if engine.submits)
    second = next(engine for engine in rig.engines if engine is not first)
    second.refuse = OUTAGE
    second.release()
    await first.kill()
    await eventually(lambda: len(second.submits) >= 2)
    return call, responses, second


async def test_a_moved_stream_outlasts_an_outage_of_the_store(valkey_url: str) -> None:
    stopping = gateway_pb2.StoppingParams(max_new_tokens=20)
    async with running_gateway(valkey_url, num_engines=2) as rig:
        call, responses, second = await _moved_into_an_outage(rig, text_request(adapter="poet", stopping=stopping))
        second.refuse = None

        responses += await rest(call)

        assert tokens_of(responses) == list(letters(second.submits[-1]))
        assert responses[-1].finished.usage.output_tokens == 20
        rig.check_idle()


async def test_a_moved_stream_is_interrupted_once_the_outage_lasts_too_long(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2, failover_wait_s=0.6) as rig:
        call, _, _ = await _moved_into_an_outage(rig, text_request(adapter="poet"))

        error = await failure_of(call)

        assert isinstance(error, StreamInterruptedError)
        assert "cannot read the adapter" in error.message
        assert error.metadata["resume_token"]
        rig.check_idle()


async def test_a_moved_stream_ends_by_its_time_limit_during_an_outage(valkey_url: str) -> None:
    request = text_request(adapter="poet")
    request.time_limit.FromMilliseconds(1500)
    async with running_gateway(valkey_url, num_engines=2) as rig:
        call, responses, _ = await _moved_into_an_outage(rig, request)

        responses += await rest(call)

        assert responses[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_TIME_LIMIT
        await eventually(lambda: _resumes(rig) == {"time_limit": 1.0})
        rig.check_idle()


async def test_a_moved_stream_can_be_cancelled_during_an_outage(valkey_url: str) -> None:
    request = text_request(adapter="poet", request_id=new_request_id())
    async with running_gateway(valkey_url, num_engines=2) as rig:
        call, responses, _ = await _moved_into_an_outage(rig, request)

        await rig.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id=request.request_id))
        responses += await rest(call)

        assert responses[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
        rig.check_idle()


async def test_a_request_that_no_engine_began_hears_of_the_outage_at_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.refuse = OUTAGE

        assert isinstance(await failure_of(rig.stub.Generate(text_request(adapter="poet"))), StoreUnavailableError)
        sent = [submit.request_id for submit in rig.engine.submits]
        assert len(sent) == len(set(sent))  # the channel's own retries are calls of their own


async def test_a_request_that_an_engine_cannot_take_goes_elsewhere(valkey_url: str) -> None:
    for refusal in (DrainingError("draining"), EngineOomError("no memory"), EngineHungError("its step hangs")):
        async with running_gateway(valkey_url, num_engines=2) as rig:
            rig.engines[0].refuse = refusal
            for _ in range(4):
                response = await rig.stub.GenerateOnce(Once(request=text_request()))
                assert response.started.engine_id == rig.engines[1].engine_id


async def test_a_requests_own_failure_is_the_status_of_its_call(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.refuse = AdapterLoadingError("on its way", retry_after_s=1.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(Once(request=text_request(load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST)))
        error = error_from_rpc(caught.value)
        assert isinstance(error, AdapterLoadingError)
        assert error.retry_after_s == 1.5
        assert sum(len(engine.submits) for engine in rig.engines) >= 1


async def test_without_engines_the_answer_is_no_engine_at_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=0) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.channel.unary_stream(
                "/loraplex.v1.GatewayService/Generate",
                request_serializer=gateway_pb2.GenerateRequest.SerializeToString,
                response_deserializer=gateway_pb2.GenerateResponse.FromString,
            )(text_request()).read()
        error = error_from_rpc(caught.value)
        assert isinstance(error, NoEngineError)
        assert error.drop_reason == "rejected-no-endpoints"


async def test_the_store_may_go_away_and_come_back(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        port = rig.store.port
        await rig.store.kill()
        known = await rig.stub.GenerateOnce(Once(request=text_request(adapter="poet")))
        assert known.started.adapter_revision == DIGEST

        rig.store.put("newcomer", {"latest": "99" * 32}, fingerprint=rig.engine.base.fingerprint)
        await rig.store.start(port)
        await eventually(lambda: any(entry.name == "newcomer" for entry in rig.app.names.visible_to(ANYBODY)))
        new = await rig.stub.GenerateOnce(Once(request=text_request(adapter="newcomer")))
        assert new.started.adapter_revision == "99" * 32


async def test_the_store_is_shown_the_gateways_key(valkey_url: str) -> None:
    async with running_gateway(valkey_url, peer_api_key=Secret("k3y")) as rig:
        assert rig.store.authorizations == {"Bearer k3y"}


async def test_an_adapter_imported_a_moment_ago_is_found(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        call = rig.stub.GenerateOnce(Once(request=text_request(adapter="fresh")))
        await asyncio.sleep(0)
        rig.store.put("fresh", {"latest": "88" * 32}, fingerprint=rig.engine.base.fingerprint)

        assert (await call).started.adapter_revision == "88" * 32


async def test_streams_and_new_requests_survive_the_loss_of_valkey(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        async with running_gateway(server.url) as rig:
            rig.engine.hold_at = 3
            running = rig.stub.Generate(text_request(request_id="during"))
            await running.read()

            await asyncio.to_thread(server.kill)
            rig.engine.release()

            assert (await rest(running))[-1].HasField("finished")
            for _ in range(2):
                response = await rig.stub.GenerateOnce(Once(request=text_request()), timeout=10)
                assert response.finished.usage.output_tokens == 8
            rig.check_idle()


async def test_a_silent_engine_whose_lease_ran_out_gets_nothing_new(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "PROOF_S", 2.0)
    async with running_gateway(valkey_url, num_engines=2) as rig:
        expired = rig.engines[0]
        expired.is_silent = True
        await rig.valkey.zadd("loraplex:engines", {expired.engine_id: time.time() - 1})
        await eventually(lambda: len(rig.app.pool.links) == 1)

        for _ in range(3):
            await rig.stub.GenerateOnce(Once(request=text_request()))
        assert expired.submits == []


async def test_draining_lets_running_streams_finish_and_refuses_new_ones(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2
        running = rig.stub.Generate(text_request())
        await running.read()

        drain = asyncio.create_task(rig.app.drain())
        await eventually(lambda: _is_draining(rig))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(Once(request=text_request()))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        rig.engine.release()

        assert (await rest(running))[-1].HasField("finished")
        await asyncio.wait_for(drain, 10)


def _is_draining(rig: Rig) -> bool:
    try:
        rig.app.admission.check_room()
    except DrainingError:
        return True
    return False
