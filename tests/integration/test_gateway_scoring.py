"""Scores of prompts over HTTP, against transformers and peft in fp32: echo, no new tokens, log-probabilities."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from support.oracle import Oracle
from support.stack_fixtures import import_all
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from support.stack import Stack

pytestmark = pytest.mark.integration

BASE, ADAPTER = "tiny", "tiny-b"
TEXT = "the quick brown fox, caf\u00e9 \U0001f600 jumps"
TOLERANCE = 1e-3


class Scores:
    """What the model makes of tokens, as an answer should have it."""

    def __init__(self, oracle: Oracle, token_ids: Sequence[int], adapter: str | None) -> None:
        logits = oracle.logits(token_ids, adapter).astype(np.float64)
        self.all: NDArray[np.float64] = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))[:, None]
        self.all -= logits.max(-1, keepdims=True)
        self.chosen = [float(self.all[n - 1, token_ids[n]]) for n in range(1, len(token_ids))]
        self.best = [float(row.max()) for row in self.all[:-1]]


@pytest.fixture(scope="module")
def oracle(tiny_world: tuple[Path, Path]) -> Oracle:
    model, adapters = tiny_world
    return Oracle(model, {ADAPTER: adapters / ADAPTER})


@pytest.fixture(scope="module")
def tokenizer(tiny_world: tuple[Path, Path]) -> Any:
    return Tokenizer.from_file(str(tiny_world[0] / "tokenizer.json"))


@pytest.fixture
async def http(tiny_stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    import_all(tiny_stack)
    async with httpx.AsyncClient(base_url=f"http://{tiny_stack.gateway.addresses['http']}", timeout=60) as client:
        yield client


async def complete(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json={"model": BASE, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("model", [BASE, ADAPTER])
async def test_echoed_scores_are_those_of_transformers_for_every_prompt_of_a_batch(
    http: httpx.AsyncClient, oracle: Oracle, model: str
) -> None:
    prompts = [[5 + (7 * n * k) % 300 for n in range(1, 40 + k)] for k in range(1, 4)]
    for _ in range(2):  # what follows finds their pages in the prefix cache
        await complete(http, model=model, prompt=prompts, max_tokens=1)

    answer = await complete(http, model=model, prompt=prompts, max_tokens=1, logprobs=2, echo=True, seed=1234)

    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs, drawn = choice["logprobs"], len(choice["logprobs"]["tokens"]) - len(prompt)
        expected = Scores(oracle, prompt, None if model == BASE else model)
        assert drawn == 1
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1 : len(prompt)] == pytest.approx(expected.chosen, abs=TOLERANCE)
        best = [max(top.values()) for top in logprobs["top_logprobs"][1 : len(prompt)]]
        assert best == pytest.approx(expected.best, abs=TOLERANCE)
        # What lm-eval goes by: a token is the greedy one if no score is above its own.
        is_greedy = [score == top for score, top in zip(logprobs["token_logprobs"][1 : len(prompt)], best, strict=True)]
        assert is_greedy == [prompt[n + 1] == int(expected.all[n].argmax()) for n in range(len(prompt) - 1)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == len(prompts)


async def test_an_echo_is_the_prompt_as_it_was_sent_with_the_place_of_each_token(http: httpx.AsyncClient) -> None:
    answer = await complete(http, prompt=TEXT, max_tokens=3, logprobs=0, echo=True)
    without = await complete(http, prompt=TEXT, max_tokens=3, logprobs=0)
    plain = await complete(http, prompt=TEXT, max_tokens=3, echo=True)

    (choice,), (output,) = answer["choices"], without["choices"]
    logprobs, offsets = choice["logprobs"], choice["logprobs"]["text_offset"]
    num_prompt_tokens = answer["usage"]["prompt_tokens"]
    assert choice["text"] == plain["choices"][0]["text"] == TEXT + output["text"]
    assert plain["choices"][0]["logprobs"] is None
    assert offsets == sorted(offsets)
    assert offsets[num_prompt_tokens:] == [len(TEXT) + at for at in output["logprobs"]["text_offset"]]
    for token, at in zip(logprobs["tokens"][:num_prompt_tokens], offsets, strict=False):
        if not token.startswith("bytes:") and token != "<|bos|>":
            assert TEXT[at:].startswith(token)


async def test_the_echo_of_token_ids_is_their_text(http: httpx.AsyncClient, tokenizer: Any) -> None:
    ids = tokenizer.encode("over the lazy dog", add_special_tokens=False).ids

    answer = await complete(http, prompt=[ids, ids[:3]], max_tokens=0, echo=True, return_token_ids=True)

    assert [choice["text"] for choice in answer["choices"]] == [tokenizer.decode(ids), tokenizer.decode(ids[:3])]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [ids, ids[:3]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[], []]


async def test_no_new_tokens_only_read_the_prompt(http: httpx.AsyncClient, tiny_stack: Stack) -> None:
    body = {"prompt": TEXT, "max_tokens": 0}
    scored = await complete(http, **body, echo=True, logprobs=1)
    bare = await complete(http, **body)
    streamed = await stream(http, "/v1/completions", **body, echo=True, logprobs=1)
    chat = await http.post("/v1/chat/completions", json={"model": BASE, "messages": USER, "max_completion_tokens": 0})
    async with open_channel(tiny_stack.gateway.grpc) as channel:
        request = gateway_pb2.GenerateRequest(text=TEXT, stopping=gateway_pb2.StoppingParams(max_new_tokens=0))
        once = gateway_pb2.GenerateOnceRequest(request=request)
        over_grpc = await gateway_pb2_grpc.GatewayServiceStub(channel).GenerateOnce(once)

    for choice, usage in ((each["choices"][0], each["usage"]) for each in (scored, bare, chat.json())):
        assert (choice["finish_reason"], usage["completion_tokens"]) == ("length", 0)
    assert (bare["choices"][0]["text"], chat.json()["choices"][0]["message"]["content"]) == ("", "")
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == scored["usage"]["prompt_tokens"]
    assert [chunk["choices"][0]["text"] for chunk in streamed] == [TEXT, ""]
    assert streamed[0]["choices"][0]["logprobs"] == scored["choices"][0]["logprobs"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"
    assert (list(over_grpc.token_ids), over_grpc.finished.usage.output_tokens) == ([], 0)
    assert over_grpc.finished.finish_reason == gateway_pb2.FINISH_REASON_LENGTH


async def test_a_streamed_echo_adds_up_to_the_whole_one(http: httpx.AsyncClient) -> None:
    body = {"prompt": TEXT, "max_tokens": 5, "logprobs": 1, "echo": True, "return_token_ids": True}

    (whole,) = (await complete(http, **body))["choices"]
    chunks = [chunk["choices"][0] for chunk in await stream(http, "/v1/completions", **body)]

    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in parts[0]} == whole["logprobs"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])


@pytest.mark.parametrize("model", [BASE, ADAPTER])
async def test_prompt_logprobs_have_vllms_shape_for_both_endpoints(
    http: httpx.AsyncClient, oracle: Oracle, tokenizer: Any, model: str
) -> None:
    messages = {"messages": USER, "max_tokens": 1, "return_token_ids": True, "prompt_logprobs": 3, "temperature": 0}
    ids = tokenizer.encode(TEXT).ids

    completion = await complete(http, model=model, prompt=ids, max_tokens=1, prompt_logprobs=3)
    chat = (await http.post("/v1/chat/completions", json={"model": model, **messages})).json()

    for token_ids, entries in (
        (ids, completion["choices"][0]["prompt_logprobs"]),
        (chat["prompt_token_ids"], chat["prompt_logprobs"]),
    ):
        expected = Scores(oracle, token_ids, None if model == BASE else model)
        assert (entries[0], len(entries)) == (None, len(token_ids))
        for n, entry in enumerate(entries[1:]):
            found = entry[str(token_ids[n + 1])]
            assert found["logprob"] == pytest.approx(expected.chosen[n], abs=TOLERANCE)
            ranked = {each["rank"]: each["logprob"] for each in entry.values() if each["rank"] is not None}
            best = sorted(expected.all[n])[::-1][:3]
            assert [ranked[rank] for rank in (1, 2, 3)] == pytest.approx(best, abs=TOLERANCE)
            assert len(entry) == (3 if found["rank"] is not None else 4)


async def test_prompt_logprobs_of_a_stream_are_refused_by_name(http: httpx.AsyncClient) -> None:
    body = {"model": BASE, "prompt": "x", "stream": True, "prompt_logprobs": 1}

    error = (await http.post("/v1/completions", json=body)).json()["error"]

    assert (error["param"], "not supported with stream" in error["message"]) == ("prompt_logprobs", True)


USER = [{"role": "user", "content": "Define: patience"}]


async def stream(http: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer."""
    response = await http.post(path, json={"model": BASE, "temperature": 0, "stream": True, **body})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]
