"""Requests of adapters that add tokens: encoded, decoded, stopped and resumed with the adapter's own tokenizer."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from google.protobuf.json_format import ParseDict
from loraplex.v1 import gateway_pb2
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import InvalidParameterError
from loraplex_common.token_rows import MOST_ADDED_TOKENS
from support.adapters import Recipe, adapter_files
from support.added_tokens import NUM_TOKENS, extended_by_transformers, padded_base_dir, saved
from support.cut_streams import another_gateway, cut, long_text, read_all, rest_of
from support.gateway_rig import Rig, running_gateway, text_request
from support.store_rig import StoreClient, refused, running_rig, store_config, translated
from tokenizers import AddedToken
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

FIRST = NUM_TOKENS
LEFT = (AddedToken("<left>", special=True), AddedToken("<call>"), AddedToken("</call>", special=True))
RIGHT = (AddedToken("<right>"),)
TEMPLATE = "{% for m in messages %}<left>{{ m.content }}{% endfor %}"
CALLER = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)
CALL_TOKENS = (AddedToken("<tool_call>", special=True), AddedToken("</tool_call>", special=True))


@dataclass
class World:
    """A gateway over a store with the adapters left and right, which add tokens, and plain, which does not."""

    rig: Rig
    store_target: str
    theirs: dict[str, Any]

    async def once(self, adapter: str, text: str | None = "x", **fields: Any) -> gateway_pb2.GenerateOnceResponse:
        request = ParseDict({"adapter": adapter, "text": text, **fields}, gateway_pb2.GenerateRequest())
        request.stopping.max_new_tokens = request.stopping.max_new_tokens or 8
        with translated():
            return await self.rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request))

    def replies(self, *ids: int) -> None:
        """Have the engine answer with these ids."""
        for engine in self.rig.engines:
            engine.reply = lambda _: list(ids)


@functools.cache
def tokenizer_of(tokens: tuple[AddedToken, ...]) -> tuple[Any, dict[str, bytes]]:
    """Return transformers' tokenizer of the folder of an adapter that adds tokens, and its files; the base's for none."""
    if not tokens:
        return AutoTokenizer.from_pretrained(padded_base_dir()), {}
    with tempfile.TemporaryDirectory() as folder:
        files = saved(extended_by_transformers(padded_base_dir(), tokens), Path(folder))
        return AutoTokenizer.from_pretrained(folder), files


async def upload(client: StoreClient, name: str, tokens: tuple[AddedToken, ...], seed: int, **texts: str) -> Any:
    """Import an adapter that adds tokens; return transformers' tokenizer of its folder."""
    theirs, files = tokenizer_of(tokens)
    own = {file.replace("__", "."): text.encode() for file, text in texts.items()}
    await client.upload(name, files | own | adapter_files(padded_base_dir(), Recipe(seed=seed)))
    return theirs


@asynccontextmanager
async def world(redis_url: str, valkey_url: str, **options: Any) -> AsyncIterator[World]:
    async with running_rig(store_config(redis_url, model=(padded_base_dir(),))) as (store, client):
        theirs = {
            "left": await upload(client, "left", LEFT, 1),
            "right": await upload(client, "right", RIGHT, 2),
            "caller": await upload(client, "caller", CALL_TOKENS, 3, chat_template__jinja=CALLER),
            "talker": await upload(client, "talker", LEFT, 4, chat_template__jinja=TEMPLATE),
            "": await upload(client, "plain", (), 5),
        }
        target = f"127.0.0.1:{store.grpc_port}"
        async with running_gateway(valkey_url, store_target=target, **padded(), **options) as rig:
            yield World(rig, target, theirs)


def padded() -> dict[str, Any]:
    return {"model": (padded_base_dir(),), "base": load_base_model(padded_base_dir())}


async def test_each_adapters_prompts_are_its_tokenizers(redis_url: str, valkey_url: str) -> None:
    texts = ["a <left> b", "<right><left>", "the quick <call>brown</call>"]
    async with world(redis_url, valkey_url) as here:
        for adapter in ("left", "right", ""):
            for text in texts:
                await here.once(adapter, text)
                submit = here.rig.engine.submits[-1]
                assert list(submit.prompt_token_ids) == here.theirs[adapter].encode(text), (adapter, text)
        await here.once("talker", messages={"messages": [{"role": "user", "content": "hi <call>"}]}, text=None)
        expected = here.theirs["left"].encode("<left>hi <call>", add_special_tokens=False)
        assert list(here.rig.engine.submits[-1].prompt_token_ids) == expected
        here.rig.check_idle()


async def test_two_adapters_with_tokens_of_one_id_show_their_own_texts_in_one_batch(
    redis_url: str, valkey_url: str
) -> None:
    async with world(redis_url, valkey_url) as here:
        here.replies(FIRST, 70, FIRST + 1, 71)
        shown: dict[str, Any] = {"response_options": {"skip_special_tokens": False, "text": True}}

        answers = await asyncio.gather(*(here.once(name, **shown) for name in 4 * ("left", "right", "plain")))
        skipped = await here.once("left", response_options={"skip_special_tokens": True, "text": True})

        ids = [FIRST, 70, FIRST + 1, 71]
        for n, name in enumerate(("left", "right", "plain")):
            expected = here.theirs[name if name != "plain" else ""].decode(ids, skip_special_tokens=False)
            assert {answers[at].text for at in range(n, 12, 3)} == {expected}, name
        assert skipped.text == here.theirs["left"].decode(ids, skip_special_tokens=True)


async def test_stop_strings_log_probabilities_and_bad_words_know_the_added_tokens(
    redis_url: str, valkey_url: str
) -> None:
    async with world(redis_url, valkey_url) as here:
        here.replies(70, FIRST, 71, 72)
        stopped = await here.once("left", stopping={"stop_strings": ["<left>"]})
        told = await here.once(
            "left", response_options={"logprobs": 1, "skip_special_tokens": False}, sampling={"bad_words": ["<call>"]}
        )

        sent = here.rig.engine.submits[-1].bad_token_sequences
        assert stopped.finished.stop_string == "<left>"
        assert [entry.chosen.text for entry in told.logprobs][1] == "<left>"
        assert [FIRST + 1] in [list(sequence.ids) for sequence in sent]


async def test_tokens_are_told_and_shown_under_the_adapters_name(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as here, httpx.AsyncClient(base_url=here.rig.http) as http:
        answers = {}
        for model in ("left", "plain"):
            body = {"prompt": "a <left>", "model": model, "return_token_strs": True}
            tokens = (await http.post("/tokenize", json=body)).json()
            text = (await http.post("/detokenize", json={"tokens": [FIRST, 70], "model": model})).json()["prompt"]
            answers[model] = (tokens["tokens"], tokens["token_strs"][-1], text)
        with translated():
            ids = await here.rig.stub.Tokenize(gateway_pb2.TokenizeRequest(text="a <left>", adapter="left"))
            whole = await here.rig.stub.Detokenize(gateway_pb2.DetokenizeRequest(token_ids=[FIRST, 70], adapter="left"))
            bare = await here.rig.stub.Detokenize(
                gateway_pb2.DetokenizeRequest(token_ids=[FIRST, 70], adapter="left", skip_special_tokens=True)
            )

        letter = here.theirs[""].decode([70])
        assert answers["left"] == (here.theirs["left"].encode("a <left>"), "<left>", "<left>" + letter)
        assert answers["plain"] == (here.theirs[""].encode("a <left>"), ">", letter)
        assert list(ids.token_ids) == answers["left"][0]
        assert (whole.text, bare.text) == ("<left>" + letter, letter)


async def test_ids_beyond_the_rows_are_refused_by_name(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as here:
        for adapter in ("left", ""):
            for fields in (
                {"token_ids": {"ids": [384]}, "text": None},
                {"sampling": {"logit_bias": {"384": 1.0}}},
                {"stopping": {"stop_token_ids": [384]}},
            ):
                with refused(InvalidParameterError, "holds 384; token ids of this model are 0 to 383"):
                    await here.once(adapter, **fields)
        assert not here.rig.engine.submits


async def test_a_stream_goes_on_through_a_gateway_that_has_not_had_the_tokenizer(
    redis_url: str, valkey_url: str
) -> None:
    reply = [70, FIRST, 71, FIRST + 1, 72, FIRST, 73, FIRST + 1, 74, 75]
    async with world(redis_url, valkey_url, reply=lambda _: list(reply)) as here:
        options = gateway_pb2.ResponseOptions(text=True, token_ids=True, skip_special_tokens=False)
        request = long_text(adapter="left", response_options=options)
        request.text = "go <left>"
        got = await cut(here.rig, request, at=4)
        async with another_gateway(valkey_url, store_target=here.store_target, **padded()) as other:
            rest = await read_all(other, got.resumed())
        text = got.text + "".join(response.chunk.text for response in rest)

    first, resumed = here.rig.engine.submits
    assert list(resumed.prompt_token_ids) == list(first.prompt_token_ids) == here.theirs["left"].encode("go <left>")
    assert text == here.theirs["left"].decode(reply, skip_special_tokens=False)


async def test_a_client_resumes_an_output_with_the_last_row_that_an_engine_may_take(
    redis_url: str, valkey_url: str
) -> None:
    last = load_base_model(padded_base_dir()).vocab_size + MOST_ADDED_TOKENS - 1  # a row that no token names: padding
    reply = [70, last, 71, last, 72]
    async with world(redis_url, valkey_url, reply=lambda _: list(reply)) as here:
        request = long_text(adapter="left", response_options=gateway_pb2.ResponseOptions(text=True, token_ids=True))
        got = await cut(here.rig, request, at=4)
        async with another_gateway(valkey_url, store_target=here.store_target, **padded()) as other:
            rest = await read_all(other, got.resumed())

    assert got.token_ids + [each for response in rest for each in response.chunk.token_ids] == reply


async def test_a_stream_that_moves_to_another_engine_keeps_its_tokens(redis_url: str, valkey_url: str) -> None:
    reply = [70, FIRST, 71, FIRST + 1, 72]
    async with world(redis_url, valkey_url, reply=lambda _: list(reply), num_engines=2) as here:
        for engine in here.rig.engines:
            engine.hold_at = 3
        request = text_request(adapter="left")
        request.response_options.skip_special_tokens = False
        call = here.rig.stub.Generate(request, timeout=30)
        responses: list[Any] = []
        while sum(len(each.chunk.token_ids) for each in responses) < 3:
            responses.append(await call.read())
        (first,) = [engine for engine in here.rig.engines if engine.submits]
        await first.kill()
        for engine in here.rig.engines:
            engine.release()
        responses += await rest_of(call)

    text = "".join(response.chunk.text for response in responses)
    assert text == here.theirs["left"].decode(reply, skip_special_tokens=False)


async def test_calls_are_read_between_markers_that_the_adapter_adds(redis_url: str, valkey_url: str) -> None:
    tool = {"type": "function", "function": {"name": "turn", "parameters": {"type": "object", "properties": {}}}}
    strict = {"type": "function", "function": tool["function"] | {"strict": True}}  # type: ignore[operator]
    async with world(redis_url, valkey_url) as here, httpx.AsyncClient(base_url=here.rig.http) as http:
        answer = '<tool_call>\n{"name": "turn", "arguments": {"page": 3}}\n</tool_call>'
        ids = here.theirs["caller"].encode(answer, add_special_tokens=False)
        assert {FIRST, FIRST + 1} <= set(ids)
        here.replies(*ids)
        here.rig.engine.finish = gateway_pb2.FINISH_REASON_STOP
        body = {"model": "caller", "messages": [{"role": "user", "content": "go"}], "tools": [tool], "max_tokens": 99}

        read = (await http.post("/v1/chat/completions", json=body)).json()
        assert (await http.post("/v1/chat/completions", json=body | {"tools": [strict]})).status_code == 200

        (call,) = read["choices"][0]["message"]["tool_calls"]
        assert (call["function"]["name"], call["function"]["arguments"]) == ("turn", '{"page": 3}')
        grammar = here.rig.engine.submits[-1].structured_output.grammar
        assert '"<tool_call>"' in grammar  # spelt: a constraint knows the base model's tokens alone
        assert f"<[{FIRST}]>" not in grammar


async def test_adapters_that_add_the_same_share_one_tokenizer(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as here:
        await asyncio.gather(*(here.once(name) for name in 3 * ("left", "talker", "right")))
        voices = [voice.tokenizer for voice in here.rig.app.voices._kept.values()]

        assert len(voices) == 3
        assert len({id(tokenizer.table) for tokenizer in voices}) == 2
        assert here.rig.app.catalog.models[0].tokenizer.table not in [tokenizer.table for tokenizer in voices]
