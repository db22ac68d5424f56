"""Functions and thoughts over HTTP, with the official client: what the model writes comes apart, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_client import AsyncClient
from loraplex_common.base_model import load_base_model
from support.gateway_rig import Rig, model_directory, running_gateway
from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration

USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
THINKER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "<tool_call>{{ m.tool_calls[0].function | tojson }}</tool_call>{% endif %}{% endfor %}"
    "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>'


@asynccontextmanager
async def client_of(rig: Rig) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose template thinks and has tools; the tags of both are special tokens."""
    directory = tmp_path_factory.mktemp("models") / "thinker"
    shutil.copytree(model_directory(), directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(THINKER)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.get_vocab_size()}))
    return directory


@asynccontextmanager
async def answering(
    valkey_url: str, text: str, directory: Path | None = None, **overrides: Any
) -> AsyncIterator[tuple[Rig, Any]]:
    """Run a gateway whose engine writes this text, and a client of it."""
    directory = directory or model_directory()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    base = load_base_model(directory)
    async with running_gateway(
        valkey_url, reply=lambda _: ids, base=base, model=(directory,), max_model_len=4096, **overrides
    ) as rig:
        rig.engine.finish = gateway_pb2.FINISH_REASON_STOP
        async with client_of(rig) as client:
            yield rig, client
        rig.check_idle()


async def whole_of(stream: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return what the chunks of a stream's first choice add up to, and the chunks."""
    chunks = [chunk async for chunk in stream]
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for choice in (chunk.choices[0] for chunk in chunks if chunk.choices):
        message["content"] += choice.delta.content or ""
        message["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(message["tool_calls"])
                message["tool_calls"].append([call.id, call.function.name, ""])
            message["tool_calls"][call.index][2] += call.function.arguments
        message["finish_reason"] = choice.finish_reason or message.get("finish_reason")
    return message, chunks


async def test_a_call_comes_apart_whole_and_streamed(valkey_url: str) -> None:
    async with answering(valkey_url, f"Let me see.\n{CALL}") as (_, client):
        asked = {"model": "tiny", "messages": USER, "tools": [WEATHER]}
        whole = await client.chat.completions.create(**asked)
        streamed, chunks = await whole_of(await client.chat.completions.create(**asked, stream=True))

        (choice,) = whole.choices
        (call,) = choice.message.tool_calls
        assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "K\u00f6ln"})
        ((call_id, name, arguments),) = streamed["tool_calls"]
        assert call_id.startswith("call_")
        assert (name, arguments) == ("get_weather", call.function.arguments)
        assert (streamed["content"], streamed["finish_reason"]) == ("Let me see.", "tool_calls")
        with_arguments = [c for c in chunks if c.choices and c.choices[0].delta.tool_calls]
        assert len(with_arguments) > 3  # as the text arrives


async def test_a_template_without_tools_hears_of_them_in_words(valkey_url: str) -> None:
    async with answering(valkey_url, "Fine.") as (rig, client):
        called = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
        turns = [
            {"role": "system", "content": "Be brief."},
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ]
        answer = await client.chat.completions.create(model="tiny", messages=turns, tools=[WEATHER])

        ids = list(rig.engine.submits[0].prompt_token_ids)
        prompt = rig.app.catalog.models[0].tokenizer.decode_now(ids, skip_special_tokens=False)
        assert prompt.startswith("<|im_start|>system\nBe brief.\n\n")
        assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in prompt
        assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in prompt
        assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>" in prompt
        assert answer.choices[0].message.content == "Fine."
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
async def test_a_forced_call_ends_as_openais_do(valkey_url: str, choice: Any, finish: str) -> None:
    async with answering(valkey_url, CALL) as (_, client):
        answer = await client.chat.completions.create(
            model="tiny", messages=USER, tools=[WEATHER], tool_choice=choice, n=2
        )

        for made in answer.choices:
            assert made.finish_reason == finish
            assert made.message.content is None
            assert [call.function.name for call in made.message.tool_calls] == ["get_weather"]
        ids = {made.message.tool_calls[0].id for made in answer.choices}
        assert len(ids) == 2


async def test_tool_choice_none_offers_no_function(valkey_url: str) -> None:
    async with answering(valkey_url, CALL) as (rig, client):
        answer = await client.chat.completions.create(model="tiny", messages=USER, tools=[WEATHER], tool_choice="none")

        assert answer.choices[0].message.content == CALL
        plain = await client.chat.completions.create(model="tiny", messages=USER)
        assert plain.usage.prompt_tokens == answer.usage.prompt_tokens
        assert rig.engine.submits[0].prompt_token_ids == rig.engine.submits[1].prompt_token_ids


async def test_thoughts_come_apart_and_special_tags_stay_inside(valkey_url: str, thinker: Path) -> None:
    text = f"<think>\nHm, well.\n</think>\n\nHello {CALL}"
    async with answering(valkey_url, text, thinker) as (_, client):
        asked = {"model": "thinker", "messages": USER, "tools": [WEATHER]}
        whole = await client.chat.completions.create(**asked)
        streamed, chunks = await whole_of(
            await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        hidden = await client.chat.completions.create(**asked, extra_body={"include_reasoning": False})

        message = whole.choices[0].message
        assert (message.reasoning_content, message.reasoning, message.content) == ("Hm, well.", "Hm, well.", "Hello")
        assert (streamed["reasoning"], streamed["content"]) == ("Hm, well.", "Hello")
        assert len(message.tool_calls) == len(streamed["tool_calls"]) == 1
        assert not hasattr(hidden.choices[0].message, "reasoning_content")
        assert hidden.choices[0].message.content == "Hello"
        tokenizer = Tokenizer.from_file(str(thinker / "tokenizer.json"))
        num_thought = len(tokenizer.encode("<think>\nHm, well.\n</think>", add_special_tokens=False).ids)
        assert whole.usage.completion_tokens_details.reasoning_tokens == num_thought
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == num_thought


@pytest.mark.parametrize("include_reasoning", [True, False])
async def test_an_output_that_is_cut_within_its_thoughts_has_no_content(
    valkey_url: str, thinker: Path, include_reasoning: bool
) -> None:
    async with answering(valkey_url, "<think>\nHm, well", thinker) as (_, client):
        answer = await client.chat.completions.create(
            model="thinker", messages=USER, extra_body={"include_reasoning": include_reasoning}
        )

        assert answer.choices[0].message.content is None


async def test_a_prompt_that_closes_the_thoughts_has_an_answer_of_content_alone(valkey_url: str, thinker: Path) -> None:
    async with answering(valkey_url, "Hello", thinker) as (_, client):
        for extra in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            answer = await client.chat.completions.create(model="thinker", messages=USER, extra_body=extra)

            assert answer.choices[0].message.content == "Hello"
            assert answer.usage.completion_tokens_details is None


async def test_reasoning_effort_reaches_the_template_that_reads_it(valkey_url: str, thinker: Path) -> None:
    async with answering(valkey_url, "Hello", thinker) as (rig, client):
        await client.chat.completions.create(model="thinker", messages=USER, reasoning_effort="high")

        ids = list(rig.engine.submits[0].prompt_token_ids)
        assert "high<|im_start|>assistant" in rig.app.catalog.models[0].tokenizer.decode_now(
            ids, skip_special_tokens=False
        )


async def test_a_request_may_bring_its_template_where_the_operator_says_so(valkey_url: str) -> None:
    bad = {"chat_template": "{% for x in %}"}
    async with answering(valkey_url, "Hello", allow_request_chat_template=True) as (rig, client):
        asked = {"model": "tiny", "messages": USER}
        await client.chat.completions.create(**asked, extra_body={"chat_template": "{{ messages[0].content }}!"})
        with pytest.raises(openai.BadRequestError, match="line 1") as caught:
            await client.chat.completions.create(**asked, extra_body=bad)

        assert caught.value.param == "chat_template"
        with pytest.raises(openai.BadRequestError, match="the request's own chat template refuses") as caught:
            await client.chat.completions.create(**asked, extra_body={"chat_template": "{{ raise_exception('no') }}"})
        assert caught.value.param == "chat_template"
        ids = list(rig.engine.submits[0].prompt_token_ids)
        assert rig.app.catalog.models[0].tokenizer.decode_now(ids, skip_special_tokens=False) == "hi!"


async def test_grpc_renders_what_http_renders_and_leaves_the_output_as_it_is(valkey_url: str, thinker: Path) -> None:
    called = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    turns: list[dict[str, Any]] = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [called], "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    async with answering(valkey_url, CALL, thinker) as (rig, client):
        await client.chat.completions.create(model="thinker", messages=turns, tools=[WEATHER])
        async with AsyncClient(f"127.0.0.1:{rig.app.grpc_port}") as grpc_client:
            answer = await grpc_client.generate_once(messages=turns, tools=[WEATHER], skip_special_tokens=False)
            ids = await grpc_client.tokenize(messages=turns, tools=[WEATHER])

        first, second = (tuple(submit.prompt_token_ids) for submit in rig.engine.submits)
        assert first == second == ids
        assert answer.text == CALL


async def test_without_tools_and_thoughts_the_text_is_the_answer_to_the_letter(valkey_url: str) -> None:
    text = f" <think>{CALL} \n"
    async with answering(valkey_url, text) as (_, client):
        answer = await client.chat.completions.create(model="tiny", messages=USER)

        assert answer.choices[0].message.content == text
        assert answer.usage.completion_tokens_details is None
