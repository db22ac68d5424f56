"""What the gateway refuses, over the wire: a clear status with details, and nothing else disturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import (
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    ModelNotFoundError,
    NotSupportedError,
    RequestRunningError,
    UnauthenticatedError,
)
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import Rig, running_gateway, text_request

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


async def refused(rig: Rig, request: gateway_pb2.GenerateRequest, **call: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.stub.Generate(request, **call).read()
    return error_from_rpc(caught.value)


BAD_REQUESTS: list[tuple[gateway_pb2.GenerateRequest, str, str]] = [
    (gateway_pb2.GenerateRequest(), "prompt", "exactly one"),
    (text_request(""), "text", "empty"),
    (gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds()), "token_ids", "empty"),
    (gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=[10**6])), "token_ids", "0 to 383"),
    (gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=[5] * 700)), "prompt", "700 input tokens"),
    (gateway_pb2.GenerateRequest(messages=gateway_pb2.ChatMessages()), "messages", "empty"),
    (text_request(sampling=gateway_pb2.SamplingParams(temperature=-3)), "sampling.temperature", "-3"),
    (text_request(sampling=gateway_pb2.SamplingParams(top_p=float("nan"))), "sampling.top_p", "nan"),
    (text_request(sampling=gateway_pb2.SamplingParams(top_k=-7)), "sampling.top_k", "-7"),
    (text_request(sampling=gateway_pb2.SamplingParams(logit_bias={1: 1e9})), "sampling.logit_bias", "100"),
    (text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=600)), "stopping.max_new_tokens", "at most 50"),
    (text_request(stopping=gateway_pb2.StoppingParams(stop_strings=["x"] * 17)), "stopping.stop_strings", "16"),
    (
        text_request(
            sampling=gateway_pb2.SamplingParams(allowed_token_ids=[1, 3]),
            stopping=gateway_pb2.StoppingParams(max_new_tokens=9, min_new_tokens=5),
        ),
        "sampling.allowed_token_ids",
        "no token can be drawn",
    ),
    (text_request(request_id="no spaces"), "request_id", "UUID4"),
    (text_request(queue_timeout=duration_pb2.Duration(seconds=-1)), "queue_timeout", "-1"),
    (text_request(adapter="../../etc/passwd"), "adapter", "no adapter name"),
]


async def test_a_bad_parameter_is_named(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for request, field, words in BAD_REQUESTS:
            error = await refused(rig, request)

            assert isinstance(error, InvalidParameterError), field
            assert field in [name for name, _ in error.violations]
            assert words in error.message
        assert rig.engine.submits == []
        rig.check_idle()


def varint_field(number: int) -> bytes:
    """Return an encoded field of the value 1."""
    key = number << 3
    return bytes([key & 0x7F | 0x80, key >> 7, 1])


async def test_a_field_of_a_newer_client_is_refused_by_its_number(valkey_url: str) -> None:
    plain = text_request().SerializeToString()
    inside = gateway_pb2.SamplingParams.FromString(varint_field(19))
    async with running_gateway(valkey_url) as rig:
        for data, field, method in (
            (plain + varint_field(126), "126", "Generate"),
            (text_request(sampling=inside).SerializeToString(), "sampling.19", "Generate"),
            (gateway_pb2.TokenizeRequest(text="x").SerializeToString() + varint_field(99), "99", "Tokenize"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await one_answer(rig, method, data)
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidParameterError)
            assert error.field == field
            assert "newer version" in error.message
        assert rig.engine.submits == []


async def one_answer(rig: Rig, method: str, data: bytes) -> None:
    call: Any = rig.channel.unary_stream if method == "Generate" else rig.channel.unary_unary
    raw = call(f"/loraplex.v1.GatewayService/{method}")(data)
    await (raw.read() if method == "Generate" else raw)


async def test_tokenize_does_not_drop_an_option_for_text_in_silence(valkey_url: str) -> None:
    chat = gateway_pb2.ChatMessages(messages=[gateway_pb2.ChatMessage(role="user", content="hi")])
    async with running_gateway(valkey_url) as rig:
        plain = await rig.stub.Tokenize(gateway_pb2.TokenizeRequest(messages=chat, add_special_tokens=False))
        with pytest.raises(grpc.aio.AioRpcError, match="goes with text only"):
            await rig.stub.Tokenize(gateway_pb2.TokenizeRequest(messages=chat, add_special_tokens=True))

        assert plain.token_ids


async def test_several_bad_parameters_are_named_at_once(valkey_url: str) -> None:
    request = text_request("", sampling=gateway_pb2.SamplingParams(temperature=-1, top_p=3))
    async with running_gateway(valkey_url) as rig:
        error = await refused(rig, request)

        assert [field for field, _ in error.violations] == ["sampling.temperature", "sampling.top_p", "text"]


async def test_invalid_utf8_in_a_prompt_is_an_invalid_argument(valkey_url: str) -> None:
    broken = text_request("X" * 8).SerializeToString().replace(b"X" * 8, b"\xff\xfe" * 4)
    async with running_gateway(valkey_url) as rig:
        raw: Any = rig.channel.unary_stream("/loraplex.v1.GatewayService/Generate")
        call = raw(broken)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))


async def test_an_unknown_adapter_never_falls_back_to_the_base_model(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for name in ("peot", "poet:nope", "poet@" + "12" * 32):
            error = await refused(rig, text_request(adapter=name))
            assert isinstance(error, AdapterNotFoundError), name
        assert "did you mean poet" in (await refused(rig, text_request(adapter="peot"))).message
        assert rig.engine.submits == []


async def test_an_adapter_of_another_base_model_is_incompatible(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        assert isinstance(await refused(rig, text_request(adapter="stranger")), AdapterIncompatibleError)


async def test_an_unknown_base_model_is_not_found(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        error = await refused(rig, text_request(model="tinny"))

        assert isinstance(error, ModelNotFoundError)
        assert "did you mean tiny" in error.message


async def test_a_request_id_can_run_only_once_at_a_time(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2
        first = rig.stub.Generate(text_request(request_id="twice"))
        await first.read()

        assert isinstance(await refused(rig, text_request(request_id="twice")), RequestRunningError)

        rig.engine.release()
        last: Any = None
        while (response := await first.read()) is not grpc.aio.EOF:
            last = response
        assert last.HasField("finished")
        again = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(request_id="twice")))
        assert again.finished.usage.output_tokens == 8


async def test_a_request_id_claimed_by_another_gateway_is_running(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as one, running_gateway(valkey_url) as two:
        for engine in (*one.engines, *two.engines):
            engine.hold_at = 2
        call = one.stub.Generate(text_request(request_id="mine"))
        await call.read()

        assert isinstance(await refused(two, text_request(request_id="mine")), RequestRunningError)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await two.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id="mine"))
        assert isinstance(error_from_rpc(caught.value), NotSupportedError)
        assert one.app.gateway_id in (caught.value.details() or "")


async def test_keys_decide_who_is_let_in_and_as_whom(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-vip vip\nkey-other other\n")
    async with running_gateway(valkey_url, api_keys_file=keys, channel_options={"api_key": "key-other"}) as rig:
        assert isinstance(await refused(rig, text_request(adapter="secret")), AdapterNotFoundError)
        assert await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))
        assert rig.engine.submits[-1].fairness_key == "other"
        http = rig.http

    async with running_gateway(valkey_url, api_keys_file=keys) as rig:
        assert isinstance(await refused(rig, text_request()), UnauthenticatedError)
    assert http
