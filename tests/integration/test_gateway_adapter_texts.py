"""Requests of an adapter that brings texts: its template, defaults and stop tokens, over a real store."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from google.protobuf.json_format import ParseDict
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import AdapterNotFoundError, InvalidParameterError, StoreUnavailableError
from loraplex_gateway.types import TextPrompt
from support.adapter_texts import PIRATE, POET, files_with, pirate_texts
from support.adapters import Recipe
from support.cut_streams import cut, long_text, read_all
from support.gateway_rig import Rig, running_gateway, text_request
from support.store_rig import (
    StoreClient,
    new_id,
    refused,
    running_rig,
    set_alias,
    store_config,
    tiny_base_dir,
    translated,
)
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "fox"}]
TRAP = "{% for m in messages %}{% if m.content == 'go' %}{{ m.content.missing.deep }}{% endif %}{{ m.content }}{% endfor %}"


@dataclass
class World:
    """A gateway over a store that has the adapters plain, pirate and poet."""

    rig: Rig
    store: StoreClient

    async def prompt(self, adapter: str = "", **variables: str) -> list[int]:
        """Return the prompt that an engine gets for `MESSAGES`, with variables of the template as JSON."""
        messages = {"messages": MESSAGES, "chat_template_kwargs": variables}
        submit = await self.submitted(adapter, messages=messages)
        return list(submit.prompt_token_ids)

    async def submitted(self, adapter: str, **fields: Any) -> Any:
        """Send a request and return what the engine got."""
        fields.setdefault("stopping", {"max_new_tokens": 2})
        request = ParseDict({"adapter": adapter, **fields}, gateway_pb2.GenerateRequest())
        request.request_id = new_id()
        with translated():
            await self.rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request))
        return next(submit for submit in self.rig.engine.submits if submit.request_id == request.request_id)


@asynccontextmanager
async def world(redis_url: str, valkey_url: str) -> AsyncIterator[World]:
    async with running_rig(store_config(redis_url)) as (store, client):
        await client.upload_recipe("plain")
        await client.upload("pirate", files_with(pirate_texts(), Recipe(seed=1)))
        await client.upload("poet", files_with({"chat_template.jinja": POET.encode()}, Recipe(seed=2)))
        async with running_gateway(valkey_url, store_target=f"127.0.0.1:{store.grpc_port}") as rig:
            yield World(rig, client)


def expected(template: str | None, **variables: Any) -> list[int]:
    """Return what transformers makes of `MESSAGES`; the oracle."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base_dir())
    eos = variables.pop("eos_token", None)
    if eos:
        tokenizer.eos_token = eos
    ids = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False, **variables
    )
    return list(ids)


async def test_each_adapters_requests_are_rendered_as_transformers_does_with_its_template(
    redis_url: str, valkey_url: str
) -> None:
    async with world(redis_url, valkey_url) as here:
        adapters = ("", "plain", "pirate", "poet") * 5
        prompts = await asyncio.gather(*(here.prompt(adapter) for adapter in adapters))
        with_kwargs = await here.prompt("poet", rhyme="true")
        here.rig.check_idle()

    own = {
        "": expected(None),
        "plain": expected(None),
        "pirate": expected(PIRATE, eos_token="<|im_start|>"),
        "poet": expected(POET),
    }
    assert len({tuple(ids) for ids in own.values()}) == 3
    assert prompts == [own[adapter] for adapter in adapters]
    assert with_kwargs == expected(POET, rhyme=True)


async def test_tokens_are_counted_with_the_adapters_template(redis_url: str, valkey_url: str) -> None:
    messages = ParseDict({"messages": MESSAGES}, gateway_pb2.ChatMessages())
    async with world(redis_url, valkey_url) as here:
        with translated():
            tokens = await here.rig.stub.Tokenize(gateway_pb2.TokenizeRequest(messages=messages, adapter="poet"))
            count = await here.rig.stub.CountTokens(gateway_pb2.CountTokensRequest(messages=messages, adapter="pirate"))
            base = await here.rig.stub.Tokenize(gateway_pb2.TokenizeRequest(messages=messages))
            with refused(AdapterNotFoundError, "nobody"):
                await asyncio.ensure_future(_tokenize(here, messages, "nobody"))

    assert (list(tokens.token_ids), list(base.token_ids)) == (expected(POET), expected(None))
    assert tokens.rendered == "THE QUICK\nFOX\n"
    assert count.num_tokens == len(expected(PIRATE, eos_token="<|im_start|>"))


async def _tokenize(here: World, messages: Any, adapter: str) -> None:
    with translated():
        await here.rig.stub.Tokenize(gateway_pb2.TokenizeRequest(messages=messages, adapter=adapter))


async def test_a_chat_over_http_is_the_adapters(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as here, httpx.AsyncClient() as http:
        body = {"model": "pirate", "messages": MESSAGES, "max_tokens": 2}
        response = await http.post(f"{here.rig.http}/v1/chat/completions", json=body)

        assert response.status_code == 200
        (submit,) = here.rig.engine.submits
        assert list(submit.prompt_token_ids) == expected(PIRATE, eos_token="<|im_start|>")
        assert submit.sampling.temperature == 0.25


async def test_defaults_and_stop_tokens_are_the_adapters_where_the_request_leaves_them_open(
    redis_url: str, valkey_url: str
) -> None:
    async with world(redis_url, valkey_url) as here:
        unset = await here.submitted("pirate", text="a")
        chosen = await here.submitted(
            "pirate",
            text="a",
            sampling={"temperature": 0.75},
            stopping={"max_new_tokens": 2, "stop_token_ids": [9, 11]},
        )
        ignoring = await here.submitted("pirate", text="a", stopping={"max_new_tokens": 2, "ignore_eos": True})
        base = await here.submitted("", text="a")
        with refused(InvalidParameterError, "65 ids together with the adapter's own"):
            await here.submitted("pirate", text="a", stopping={"stop_token_ids": list(range(20, 83))})

    assert (unset.sampling.temperature, unset.sampling.top_k) == (0.25, 7)
    assert list(unset.stopping.stop_token_ids) == [2, 9]
    assert (chosen.sampling.temperature, chosen.sampling.top_k) == (0.75, 7)
    assert list(chosen.stopping.stop_token_ids) == [9, 11, 2]
    assert (list(ignoring.stopping.stop_token_ids), ignoring.stopping.ignore_eos) == ([], True)
    assert list(base.stopping.stop_token_ids) == []
    assert not base.sampling.HasField("top_k")


async def test_an_output_ends_at_the_adapters_stop_token_without_its_text(redis_url: str, valkey_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (store, client):
        await client.upload("pirate", files_with(pirate_texts()))
        target = f"127.0.0.1:{store.grpc_port}"
        async with running_gateway(valkey_url, store_target=target, reply=lambda _: [70, 71, 9]) as rig:
            rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 9
            with translated():
                done = await rig.stub.GenerateOnce(
                    gateway_pb2.GenerateOnceRequest(request=text_request(adapter="pirate"))
                )
                base = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))

    assert done.finished.stop_token_id == 9
    assert base.text.startswith(done.text)
    assert len(base.text) > len(done.text)


async def test_a_resumed_stream_keeps_the_texts_of_its_revision_though_the_label_has_moved(
    redis_url: str, valkey_url: str
) -> None:
    async with world(redis_url, valkey_url) as here:
        request = long_text(adapter="pirate")
        request.messages.CopyFrom(ParseDict({"messages": MESSAGES}, gateway_pb2.ChatMessages()))
        got = await cut(here.rig, request)
        poet = (await here.store.get("poet")).revision.revision
        await set_alias(here.store, "pirate", "latest", poet)

        await read_all(here.rig, got.resumed())
        first, resumed = here.rig.engine.submits
        moved = await here.prompt("pirate")

    assert resumed.prompt_token_ids == first.prompt_token_ids
    assert list(resumed.prompt_token_ids) == expected(PIRATE, eos_token="<|im_start|>")
    assert (resumed.sampling, resumed.stopping.stop_token_ids) == (first.sampling, first.stopping.stop_token_ids)
    assert moved == expected(POET)


async def test_while_the_store_is_away_the_bases_template_never_answers_for_the_adapters(
    redis_url: str, valkey_url: str
) -> None:
    async with running_rig(store_config(redis_url)) as (store, client):
        await client.upload("pirate", files_with(pirate_texts(), Recipe(seed=1)))
        await client.upload("poet", files_with({"chat_template.jinja": POET.encode()}, Recipe(seed=2)))
        gateway = running_gateway(valkey_url, store_target=f"127.0.0.1:{store.grpc_port}")
        rig = await gateway.__aenter__()
        here = World(rig, client)
        await here.prompt("poet")
    try:
        assert await here.prompt("poet") == expected(POET)
        with pytest.raises(StoreUnavailableError, match="'pirate' brings texts of its own") as caught:
            await here.prompt("pirate")
        assert caught.value.retry_after_s == 1.0
        assert await here.prompt("") == expected(None)
        assert len(rig.engine.submits) == 3
    finally:
        await gateway.__aexit__(None, None, None)


async def test_a_template_that_fails_over_a_conversation_ends_that_request_alone(
    redis_url: str, valkey_url: str
) -> None:
    async with world(redis_url, valkey_url) as here:
        await here.store.upload("trap", files_with({"chat_template.jinja": TRAP.encode()}, Recipe(seed=4)))
        go = {"messages": [{"role": "user", "content": "go"}]}
        with refused(InvalidParameterError, "chat template refuses these messages"):
            await here.submitted("trap", messages=go)

        assert await here.prompt("trap")
        assert (await here.submitted("poet", messages=go)).prompt_token_ids
        here.rig.check_idle()


async def test_adapters_that_bring_the_same_share_one_copy(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as here:
        for seed in range(5, 9):
            files = files_with({"chat_template.jinja": POET.encode()}, Recipe(seed=seed))
            await here.store.upload(f"poet-{seed}", files)
        await here.prompt("poet")
        before = here.rig.app.voices.num_bytes

        prompts = await asyncio.gather(*(here.prompt(f"poet-{seed}") for seed in range(5, 9)))

        assert prompts == 4 * [expected(POET)]
        assert here.rig.app.voices.num_bytes == before


async def test_calls_are_read_in_the_format_of_the_adapters_template(redis_url: str, valkey_url: str) -> None:
    caller = (
        "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    )
    answer = '<tool_call>\n{"name": "turn", "arguments": {"page": 3}}\n</tool_call>'
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base_dir())
    ids = tokenizer.encode(answer, add_special_tokens=False)
    tools = [{"type": "function", "function": {"name": "turn", "parameters": {"type": "object", "properties": {}}}}]
    async with running_rig(store_config(redis_url)) as (store, client):
        await client.upload("caller", files_with({"chat_template.jinja": caller.encode()}))
        target = f"127.0.0.1:{store.grpc_port}"
        async with running_gateway(valkey_url, store_target=target, reply=lambda _: ids) as rig:
            rig.engine.finish = gateway_pb2.FINISH_REASON_STOP
            async with httpx.AsyncClient() as http:
                body = {"model": "caller", "messages": MESSAGES[:1], "tools": tools}
                response = await http.post(f"{rig.http}/v1/chat/completions", json=body)
            (submit,) = rig.engine.submits

    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("turn", '{"page": 3}')
    assert tokenizer.decode(list(submit.prompt_token_ids)).startswith('<tools>[{"type": "function"')


MISTRAL = (
    "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | length }}{% endif %}"
    "{% endfor %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
)


def always(ids: Sequence[int]) -> Callable[[Any], Sequence[int]]:
    return lambda _: ids


async def test_calls_are_read_as_the_adapters_own_template_has_them(redis_url: str, valkey_url: str) -> None:
    calls = {
        "poet": '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "mistral": '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    }
    async with world(redis_url, valkey_url) as w, httpx.AsyncClient() as http:
        await w.store.upload("mistral", files_with({"chat_template.jinja": MISTRAL.encode()}, Recipe(seed=3)))
        tokenizer = w.rig.app.catalog.models[0].tokenizer
        w.rig.engine.finish = gateway_pb2.FINISH_REASON_STOP
        body = {"messages": MESSAGES[:1], "tools": [{"type": "function", "function": {"name": "now"}}]}
        for adapter, text in calls.items():
            ids = tokenizer.encode_now(TextPrompt(text=text, add_special_tokens=False)).ids
            w.rig.engine.reply = always(ids)
            answer = await http.post(f"{w.rig.http}/v1/chat/completions", json={"model": adapter, **body})

            (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
            assert (call["function"]["name"], call["function"]["arguments"]) == ("now", "{}")
            assert len(call["id"]) == (9 if adapter == "mistral" else 29)
