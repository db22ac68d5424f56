"""What becomes of prompts that are too long, and of words that must not be written, as the engine gets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import ContextLengthError
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import model_directory, running_gateway, text_request
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration

IDS = list(range(5, 305))
LONG = list(range(5, 355)) * 2  # more than a sequence can have
CUT: list[tuple[list[int], dict[str, Any], list[int]]] = [
    (IDS, {"truncate_prompt_tokens": 20}, IDS[-20:]),
    (IDS, {"truncate_prompt_tokens": 20, "truncation_side": "left"}, IDS[-20:]),
    (IDS, {"truncate_prompt_tokens": 20, "truncation_side": "right"}, IDS[:20]),
    (IDS, {"truncate_prompt_tokens": 400}, IDS),
    (IDS, {"truncation_side": "right"}, IDS),
    (IDS, {"truncate_prompt_tokens": -1}, IDS),
    (LONG, {"truncate_prompt_tokens": -1}, LONG[-508:]),
    (LONG, {"truncate_prompt_tokens": -1, "max_tokens": 100}, LONG[-412:]),
    (LONG, {"truncate_prompt_tokens": -1, "max_tokens": 0}, LONG[-511:]),
]


async def complete(rig: Rig, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        return await http.post("/v1/completions", json={"model": "tiny", "max_tokens": 4, **body})


async def test_a_prompt_is_cut_to_the_tokens_that_are_wanted(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for prompt, asked, kept in CUT:
            response = await complete(rig, prompt=prompt, **asked)

            assert response.status_code == 200, response.text
            assert list(rig.engine.submits[-1].prompt_token_ids) == kept, asked
            assert response.json()["usage"]["prompt_tokens"] == len(kept)
        too_long = await complete(rig, prompt=LONG, truncate_prompt_tokens=600)
        error = too_long.json()["error"]
        assert (too_long.status_code, error["code"]) == (400, "context_length_exceeded")
        rig.check_idle()


async def test_a_prompt_is_cut_over_grpc_and_in_chats_too(valkey_url: str) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "the quick brown fox"}], "max_tokens": 1}
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        await http.post("/v1/chat/completions", json=chat)
        await http.post("/v1/chat/completions", json={**chat, "truncate_prompt_tokens": 3})
        whole, cut = (list(submit.prompt_token_ids) for submit in rig.engine.submits)
        assert cut == whole[-3:]

        request = text_request(truncate_prompt_tokens=-1)
        request.token_ids.ids.extend(LONG)
        await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request))
        assert len(rig.engine.submits[-1].prompt_token_ids) == 504
        request.ClearField("truncate_prompt_tokens")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request))
        assert isinstance(error_from_rpc(caught.value), ContextLengthError)


async def test_the_echo_of_a_prompt_that_was_cut_is_what_is_left(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        whole, cut = [
            (await complete(rig, prompt="the quick brown fox", echo=True, max_tokens=0, **asked)).json()["choices"][0]
            for asked in ({}, {"truncate_prompt_tokens": 2})
        ]

        assert whole["text"] == "the quick brown fox"
        assert cut["text"]
        assert whole["text"].endswith(cut["text"])
        assert len(cut["text"]) < len(whole["text"])


async def test_bad_words_become_the_tokens_that_write_them_with_and_without_a_space(valkey_url: str) -> None:
    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    spellings = ["the", " the", "fox jumps", " fox jumps", " ", "  "]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in spellings]
    words = ["the", " fox jumps", " ", "the"]
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        await complete(rig, prompt="x", bad_words=words)
        chat = {"model": "poet", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "bad_words": words}
        await http.post("/v1/chat/completions", json=chat)
        sampling = gateway_pb2.SamplingParams(bad_words=words)
        await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(sampling=sampling)))

        for submit in rig.engine.submits:
            assert [list(each.ids) for each in submit.bad_token_sequences] == expected
            assert list(submit.sampling.bad_words) == []
        assert len(rig.engine.submits) == 3


async def test_the_token_that_an_engine_draws_where_none_is_wanted_decides_nothing(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 11
        answer = (await complete(rig, prompt="x", max_tokens=0, stop_token_ids=[11], stop=["a"])).json()

        (choice,), (submit,) = answer["choices"], rig.engine.submits
        assert submit.stopping.max_new_tokens == 1
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "length", None)
        assert answer["usage"]["completion_tokens"] == 0
        rig.check_idle()
