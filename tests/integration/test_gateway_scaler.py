"""A gateway as KEDA's external scaler: what waits on all gateways and engines, and the first engine that comes for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.keda import externalscaler_pb2, externalscaler_pb2_grpc
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import InvalidParameterError, ModelNotFoundError, NoEngineError
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.grpc.servicer_scaler import PAGE_USAGE, QUEUE_TOKENS
from loraplex_gateway.scaling.demand import DEMAND_KEY
from support.engine_double import EngineDouble
from support.gateway_rig import Rig, letters, model_directory, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest


def scaler(rig: Rig) -> externalscaler_pb2_grpc.ExternalScalerAsyncStub:
    stub: externalscaler_pb2_grpc.ExternalScalerAsyncStub = externalscaler_pb2_grpc.ExternalScalerStub(rig.channel)
    return stub


def asked(**metadata: str) -> externalscaler_pb2.ScaledObjectRef:
    return externalscaler_pb2.ScaledObjectRef(name="engines", namespace="default", scalerMetadata=metadata)


async def is_active(rig: Rig) -> bool:
    return (await scaler(rig).IsActive(asked())).result


async def value_of(rig: Rig, name: str) -> float:
    request = externalscaler_pb2.GetMetricsRequest(scaledObjectRef=asked(), metricName=name)
    (value,) = (await scaler(rig).GetMetrics(request)).metricValues
    assert value.metricName == name
    assert value.metricValue == round(value.metricValueFloat)
    return value.metricValueFloat


async def told(stream: Any) -> bool:
    answer = await stream.read()
    assert isinstance(answer, externalscaler_pb2.IsActiveResponse)
    return answer.result


async def refusal_of(call: object) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return error_from_rpc(caught.value)


async def test_a_request_that_waits_on_one_gateway_is_answered_by_every_gateway_and_served_once_an_engine_comes(
    valkey_url: str,
) -> None:
    async with (
        running_gateway(valkey_url, num_engines=0, scale_from_zero_s=60.0) as rig,
        running_gateway(valkey_url, num_engines=0, scale_from_zero_s=60.0) as other,
    ):
        assert rig.app.is_ready
        needed = scaler(other).StreamIsActive(asked(), timeout=30)
        assert not await told(needed)
        assert await value_of(other, QUEUE_TOKENS) == 0

        call = asyncio.ensure_future(rig.stub.GenerateOnce(Once(request=text_request()), timeout=30))
        assert await told(needed)
        assert await value_of(other, QUEUE_TOKENS) == await value_of(rig, QUEUE_TOKENS) > 0
        engine = EngineDouble(base=load_base_model(model_directory()), reply=letters)
        await engine.start()
        await engine.register(rig.valkey)
        answer = await call
        await engine.unregister(rig.valkey)
        await engine.kill()

        assert answer.started.engine_id == engine.engine_id
        assert not await told(needed)
        needed.cancel()


async def test_a_request_that_waited_for_an_engine_in_vain_ends_with_that(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=0, scale_from_zero_s=0.3) as rig:
        error = await refusal_of(rig.stub.GenerateOnce(Once(request=text_request()), timeout=30))

        assert isinstance(error, NoEngineError)


async def test_without_the_flag_a_gateway_without_engines_is_not_ready_and_refuses_at_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=0) as rig:
        error = await refusal_of(rig.stub.GenerateOnce(Once(request=text_request()), timeout=30))

        assert not rig.app.is_ready
        assert isinstance(error, NoEngineError)


async def test_engines_reports_count_in_both_metrics(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        load = engine_pb2.LoadReport(queued_uncached_tokens=700, pages_total=100, pages_kv=30, pages_pinned=20)
        for engine in rig.engines:
            engine.further_load, engine.extra_load = load, 1
            engine.notify()
        await eventually(lambda: all(link.report.pages_total for link in rig.app.pool.links))

        assert await value_of(rig, QUEUE_TOKENS) == 1400
        assert await value_of(rig, PAGE_USAGE) == pytest.approx(100.0)
        assert await is_active(rig)


async def test_a_killed_gateways_word_is_forgotten(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        fingerprint = load_base_model(model_directory()).fingerprint
        await rig.valkey.hset(DEMAND_KEY, "dead", f'1000 {{"{fingerprint}": [3, 999]}}')

        assert await value_of(rig, QUEUE_TOKENS) == 0
        assert not await is_active(rig)
        assert not await rig.valkey.hexists(DEMAND_KEY, "dead")


async def test_a_stream_tells_when_engines_begin_to_be_needed(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2
        stream = scaler(rig).StreamIsActive(asked(), timeout=30)
        assert not await told(stream)

        call = asyncio.ensure_future(rig.stub.GenerateOnce(Once(request=text_request()), timeout=30))
        assert await told(stream)
        rig.engine.release()
        await call
        assert not await told(stream)
        stream.cancel()


async def test_targets_are_the_triggers(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        usual = (await scaler(rig).GetMetricSpec(asked(scalerAddress="gateway:8500"))).metricSpecs
        own = (await scaler(rig).GetMetricSpec(asked(model="tiny", queueTokens="100.5", pageUsage="1"))).metricSpecs

        assert [(each.metricName, each.targetSizeFloat) for each in usual] == [(QUEUE_TOKENS, 8192), (PAGE_USAGE, 90)]
        assert [(each.targetSize, each.targetSizeFloat) for each in own] == [(100, 100.5), (100, 100)]


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"queueTokens": "0"}, "scalerMetadata.queueTokens"),
        ({"queueTokens": "many"}, "scalerMetadata.queueTokens"),
        ({"queueTokens": "inf"}, "scalerMetadata.queueTokens"),
        ({"queueTokens": ""}, "scalerMetadata.queueTokens"),
        ({"queueTokens": "1e19"}, "scalerMetadata.queueTokens"),  # more than the protocol's whole numbers hold
        ({"queueTokens": "-1"}, "scalerMetadata.queueTokens"),
        ({"pageUsage": "1.5"}, "scalerMetadata.pageUsage"),
        ({"pageUsage": "nan"}, "scalerMetadata.pageUsage"),
        ({"queueTokenz": "10"}, "scalerMetadata.queueTokenz"),
    ],
)
async def test_a_triggers_bad_entry_is_refused_by_name(valkey_url: str, metadata: dict[str, str], field: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for call in (scaler(rig).GetMetricSpec(asked(**metadata)), scaler(rig).IsActive(asked(**metadata))):
            error = await refusal_of(call)

            assert isinstance(error, InvalidParameterError)
            assert error.field == field


async def test_unknown_models_and_metrics_are_refused_by_name(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        no_model = await refusal_of(scaler(rig).IsActive(asked(model="huge")))
        request = externalscaler_pb2.GetMetricsRequest(scaledObjectRef=asked(), metricName="rows")
        no_metric = await refusal_of(scaler(rig).GetMetrics(request))

        assert isinstance(no_model, ModelNotFoundError)
        assert isinstance(no_metric, InvalidParameterError)
        assert QUEUE_TOKENS in no_metric.message
