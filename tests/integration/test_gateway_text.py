"""The text of an output: where it begins, where it ends, and what the chat template makes of a conversation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from google.protobuf.json_format import ParseDict
from loraplex.v1 import gateway_pb2
from loraplex_common.base_model import load_base_model
from loraplex_common.rpc_errors import error_from_rpc
from support.base_models import EOS, IM_END, TinyBase, write_base_model
from support.gateway_rig import Rig, model_directory, running_gateway
from support.tokenizers_for_tests import byte_fallback_tokenizer
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.integration

TINY = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
LLAMA = byte_fallback_tokenizer()
THINKING = "{{ messages[0].content }}{{ '' if enable_thinking is defined and not enable_thinking else '<think>' }}"


def tiny_ids(text: str) -> list[int]:
    return list(TINY.encode(text, add_special_tokens=False).ids)


def llama_ids(*tokens: str) -> list[int]:
    vocabulary = LLAMA.get_vocab()
    return [vocabulary[token] for token in tokens]


def llama_base(directory: Path) -> dict[str, Any]:
    """Return a gateway's options for a base model with a SentencePiece tokenizer and a template as Llama 2 has it."""
    write_base_model(directory, TinyBase())
    (directory / "tokenizer.json").write_text(LLAMA.to_str())
    template = "<s>{% for message in messages %}{{ ' ' + message.content | trim }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return {"model": (directory,), "base": load_base_model(directory)}


async def post(rig: Rig, path: str, **body: Any) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{rig.http}/v1/{path}", json={"model": rig.app.catalog.models[0].name, **body})
    return {"status": response.status_code, **response.json()}


async def streamed(rig: Rig, **fields: Any) -> list[Any]:
    request = ParseDict(fields, gateway_pb2.GenerateRequest())
    return [response async for response in rig.stub.Generate(request)]


def text_of(responses: Sequence[Any]) -> str:
    return "".join(response.chunk.text for response in responses)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", [IM_END, f"there{IM_END}", f"{IM_END}\n{EOS}"])
async def test_a_special_tokens_text_stops_an_output_that_goes_on_behind_it(
    valkey_url: str, stop: str, skip: bool
) -> None:
    reply = tiny_ids(f"hello there{IM_END}\n{EOS} and so on")
    body = {"max_tokens": 60, "ignore_eos": True, "stop": ["never", stop], "skip_special_tokens": skip}
    shown = "hello there".removesuffix(stop.removesuffix(IM_END))
    async with running_gateway(valkey_url, reply=lambda submit: reply) as rig:
        chat = await post(rig, "chat/completions", messages=[{"role": "user", "content": "hi"}], **body)
        text = await post(rig, "completions", prompt=tiny_ids("hi"), **body)
        kept = await post(rig, "completions", prompt="hi", include_stop_str_in_output=True, **body)

        assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"] == shown
        assert {answer["choices"][0]["finish_reason"] for answer in (chat, text, kept)} == {"stop"}
        assert {answer["choices"][0]["stop_reason"] for answer in (chat, text, kept)} == {stop}
        assert kept["choices"][0]["text"] == shown + stop
        assert text["usage"]["completion_tokens"] == len(tiny_ids(f"hello there{IM_END}")) + 2 * stop.endswith(EOS)
        rig.check_idle()


async def test_a_completion_begins_with_the_space_of_its_first_word(valkey_url: str, tmp_path: Path) -> None:
    reply = llama_ids("\u2581world", "\u2581hello")
    async with running_gateway(valkey_url, reply=lambda submit: reply, **llama_base(tmp_path / "llama")) as rig:
        answers = [
            await post(rig, "completions", prompt=prompt, max_tokens=2)
            for prompt in ("hello", llama_ids("<s>", "\u2581hello"), llama_ids("<s>"))
        ]
        chat = await post(
            rig,
            "chat/completions",
            messages=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}],
            continue_final_message=True,
            max_tokens=2,
        )
        chunks = await streamed(rig, text="hello", stopping={"max_new_tokens": 2})

        assert [answer["choices"][0]["text"] for answer in answers] == [" world hello", " world hello", "world hello"]
        assert chat["choices"][0]["message"]["content"] == " world hello"
        assert [response.chunk.text for response in chunks if response.HasField("chunk")] == [" world", " hello"]


async def test_text_goes_on_where_it_was_when_another_engine_takes_over(valkey_url: str, tmp_path: Path) -> None:
    reply = llama_ids("\u2581world", "<0xE4>", "<0xBD>", "<0xA0>", "\u2581hello")
    model = llama_base(tmp_path / "llama")
    async with running_gateway(valkey_url, num_engines=2, reply=lambda submit: reply, **model) as rig:
        for engine in rig.engines:
            engine.hold_at = 3
        call: Any = rig.stub.Generate(
            gateway_pb2.GenerateRequest(text="hello", stopping=gateway_pb2.StoppingParams(max_new_tokens=5))
        )
        responses: list[Any] = [await call.read()]
        while sum(len(response.chunk.token_ids) for response in responses) < 3:
            responses.append(await call.read())
        first = next(engine for engine in rig.engines if engine.submits)
        second = next(engine for engine in rig.engines if engine is not first)
        second.release()
        await first.kill()
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)

        assert list(second.submits[0].resumed_token_ids) == reply[:3]
        assert text_of(responses) == " world\u4f60 hello"


async def test_a_templates_variables_come_from_the_client(valkey_url: str, tmp_path: Path) -> None:
    directory = write_base_model(tmp_path / "qwen", TinyBase())
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": THINKING}))
    messages = [{"role": "user", "content": "hi"}]
    off: dict[str, Any] = {"enable_thinking": False}
    async with running_gateway(valkey_url, model=(directory,), base=load_base_model(directory)) as rig:
        plain = await post(rig, "chat/completions", messages=messages, max_tokens=1)
        quick = await post(rig, "chat/completions", messages=messages, max_tokens=1, chat_template_kwargs=off)
        chat = {"messages": messages, "chat_template_kwargs": {"enable_thinking": "false"}}
        await streamed(rig, messages=chat, stopping={"max_new_tokens": 1})
        tokenized = await rig.stub.Tokenize(ParseDict({"messages": chat}, gateway_pb2.TokenizeRequest()))
        counted = await rig.stub.CountTokens(ParseDict({"messages": chat}, gateway_pb2.CountTokensRequest()))

        prompts = [TINY.decode(submit.prompt_token_ids) for submit in rig.engine.submits]
        assert (plain["status"], quick["status"]) == (200, 200)
        assert prompts == ["hi<think>", "hi", "hi"]
        assert (tokenized.rendered, counted.num_tokens) == ("hi", len(tiny_ids("hi")))


@pytest.mark.parametrize(
    "variables", [{"messages": []}, {"bos_token": ""}, {"documents": []}, {"x": [[[[[[[[[1]]]]]]]]]}]
)
async def test_variables_that_are_not_the_clients_to_set_are_refused_by_name(
    valkey_url: str, variables: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with running_gateway(valkey_url) as rig:
        answer = await post(rig, "chat/completions", messages=messages, chat_template_kwargs=variables)
        (name,) = variables
        chat = {"messages": messages, "chat_template_kwargs": {name: json.dumps(variables[name])}}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await streamed(rig, messages=chat)

        assert (answer["status"], answer["error"]["param"]) == (400, f"chat_template_kwargs.{name}")
        assert f"chat_template_kwargs.{name}" in str(error_from_rpc(caught.value))
        assert rig.engine.submits == []


async def test_a_body_of_endless_depth_is_a_bad_request(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as client:
        deep = '{"model": "tiny", "messages": [], "chat_template_kwargs": {"x": ' + "[" * 100_000
        response = await client.post(f"{rig.http}/v1/chat/completions", content=deep)

        assert response.status_code == 400
