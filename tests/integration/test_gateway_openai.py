"""The OpenAI-compatible port, with the official client."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import AdapterLoadingError
from loraplex_gateway.openai.body_reader import MAX_BODY_BYTES
from support.gateway_rig import DIGEST, Rig, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration

USER = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(rig: Rig, api_key: str = "none") -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key=api_key, max_retries=0) as client:
        yield client


async def test_models_are_base_and_adapters(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        models = [model async for model in client.models.list()]
        poet = await client.models.retrieve("poet")

        assert [model.id for model in models] == ["tiny", "poet", "poet:prod"]
        assert (poet.parent, poet.root) == ("tiny", DIGEST)


async def test_a_completion_streams_and_adds_up_to_the_whole_one(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        whole = await client.completions.create(model="tiny", prompt="the quick", max_tokens=12)
        stream = await client.completions.create(
            model="tiny", prompt="the quick", max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert whole.choices[0].finish_reason == "length"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert whole.usage.completion_tokens == 12
        rig.check_idle()


async def test_token_counts_so_far_come_with_every_chunk_if_asked_for(valkey_url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=12, stream=True, stream_options=options
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream]

        assert counts[0] == 0
        assert counts == sorted(counts)
        assert counts[-2:] == [12, 12]


async def test_a_chat_completion_with_an_adapter(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        whole = await client.chat.completions.create(model="poet", messages=USER, max_tokens=6)
        stream = await client.chat.completions.create(model="poet", messages=USER, max_tokens=6, stream=True)
        chunks = [chunk async for chunk in stream]

        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert whole.system_fingerprint == DIGEST
        assert {submit.adapter_digest for submit in rig.engine.submits} == {DIGEST}


@pytest.mark.parametrize(("given", "meant"), [("high", 3), ("batch", 1), (None, 2), (0, 2), (-5, 3), (7, 1)])
async def test_priority_by_name_or_by_vllms_numbers(valkey_url: str, given: object, meant: int) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        extra = {"priority": given, "load_policy": "fail_fast"}

        await client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body=extra)

        (submit,) = rig.engine.submits
        assert (submit.priority, submit.load_policy) == (meant, gateway_pb2.LOAD_POLICY_FAIL_FAST)


async def test_choices_have_ids_of_their_own_however_long_the_clients_is(valkey_url: str) -> None:
    ids = [f"{'i' * 124}-{n:03}" for n in range(2)]
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.hold_at = 1
        call = {"model": "tiny", "prompt": "x", "n": 2, "max_tokens": 2}
        calls = [
            asyncio.create_task(client.completions.create(**call, extra_body={"request_id": request_id}))
            for request_id in ids
        ]
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 4)
        rig.engine.release()
        answers = await asyncio.gather(*calls)

        assert [answer.id for answer in answers] == [f"cmpl-{request_id}" for request_id in ids]
        assert len({submit.request_id for submit in rig.engine.submits}) == 4


@pytest.mark.parametrize("request_id", ["\u00e9", "a\r\nx: y", "x" * 129, ""])
async def test_a_request_id_that_cannot_be_part_of_an_id_is_refused(valkey_url: str, request_id: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        with pytest.raises(openai.BadRequestError, match="request_id must be at most"):
            await client.completions.create(model="tiny", prompt="x", extra_body={"request_id": request_id})


async def test_an_unknown_route_answers_in_the_apis_own_form(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as client:
        unknown = await client.post(f"{rig.http}/v1/embeddings", json={})
        wrong_method = await client.delete(f"{rig.http}/v1/models")

        assert (unknown.status_code, wrong_method.status_code) == (404, 405)
        assert "/v1/embeddings is not served here" in unknown.json()["error"]["message"]
        assert wrong_method.headers["allow"]


async def test_extra_body_as_vllm_has_it(valkey_url: str) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.2,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [9],
        "add_generation_prompt": False,
        "return_token_ids": True,
        "adapter_scale": 0.5,
    }
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        response = await client.chat.completions.create(
            model="poet", messages=USER, max_completion_tokens=4, seed=7, temperature=0.3, extra_body=extra
        )

        (submit,) = rig.engine.submits
        assert (submit.sampling.top_k, submit.sampling.seed) == (5, 7)
        assert submit.sampling.min_p == pytest.approx(0.2)
        assert submit.sampling.repetition_penalty == pytest.approx(1.2)
        assert (submit.stopping.ignore_eos, submit.stopping.min_new_tokens) == (True, 2)
        assert list(submit.stopping.stop_token_ids) == [9]
        assert submit.adapter_scale == 0.5
        model = rig.app.catalog.models[0]
        assert not model.tokenizer.decode_now(list(submit.prompt_token_ids), skip_special_tokens=False).endswith(
            "assistant\n"
        )
        assert len(response.choices[0].token_ids) == 4


async def test_several_choices_are_drawn_with_different_seeds(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        response = await client.completions.create(model="tiny", prompt=["the", "quick"], n=2, max_tokens=3, seed=5)
        stream = await client.chat.completions.create(model="tiny", messages=USER, n=3, max_tokens=3, stream=True)
        indices = {choice.index async for chunk in stream for choice in chunk.choices}

        assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
        assert sorted(submit.sampling.seed for submit in rig.engine.submits[:4]) == [5, 5, 6, 6]
        assert response.usage.completion_tokens == 12
        prompt_tokens = {len(submit.prompt_token_ids) for submit in rig.engine.submits[:4]}
        assert response.usage.prompt_tokens == sum(prompt_tokens) or len(prompt_tokens) == 1
        assert indices == {0, 1, 2}
        rig.check_idle()


async def test_logprobs_in_both_shapes(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        text = await client.completions.create(model="tiny", prompt="the", max_tokens=3, logprobs=2)
        chat = await client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=3, logprobs=True, top_logprobs=2
        )

        assert len(text.choices[0].logprobs.tokens) == 3
        assert text.choices[0].logprobs.text_offset[0] == 0
        assert all(len(top) == 2 for top in text.choices[0].logprobs.top_logprobs)
        content = chat.choices[0].logprobs.content
        assert "".join(entry.token for entry in content) == chat.choices[0].message.content
        assert bytes(content[0].bytes).decode() == content[0].token
        assert len(content[0].top_logprobs) == 2


async def test_stop_strings_end_the_text(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        whole = (await client.completions.create(model="tiny", prompt="the", max_tokens=20)).choices[0].text
        stopped = await client.completions.create(model="tiny", prompt="the", max_tokens=20, stop=whole[6:9])

        assert stopped.choices[0].text == whole[: whole.index(whole[6:9])]
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].stop_reason == whole[6:9]


BAD_COMPLETIONS: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = [
    ({"model": "nobody"}, openai.NotFoundError, None),
    ({"model": "stranger"}, openai.UnprocessableEntityError, None),
    ({"model": ""}, openai.BadRequestError, "model"),
    ({"model": "no name"}, openai.BadRequestError, "model"),
    ({"model": "secret"}, openai.NotFoundError, None),
    ({"echo": "maybe"}, openai.BadRequestError, "echo"),
    ({"suffix": "x"}, openai.BadRequestError, "suffix"),
    ({"best_of": 3}, openai.BadRequestError, "best_of"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"prompt": ""}, openai.BadRequestError, "prompt"),
    ({"prompt": [10**6]}, openai.BadRequestError, "prompt"),
    ({"prompt": [True]}, openai.BadRequestError, "prompt[0]"),
    ({"prompt": [["a"]]}, openai.BadRequestError, "prompt[0]"),
    ({"max_tokens": "many"}, openai.BadRequestError, "max_tokens"),
    ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
    (
        {"extra_body": {"allowed_token_ids": [9], "stop_token_ids": [9], "min_tokens": 2}},
        openai.BadRequestError,
        "allowed_token_ids",
    ),
]


async def test_a_bad_request_gets_openais_error(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for (call, error, param), stream in itertools.product(BAD_COMPLETIONS, (False, True)):
            with pytest.raises(error) as caught:
                await client.completions.create(**{"model": "tiny", "prompt": "x", "stream": stream, **call})
            body: Any = caught.value.body
            assert body["param"] == param, call
            assert body["message"], call
        rig.check_idle()


async def test_one_bad_prompt_among_several_refuses_the_call_at_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for prompt, stream in itertools.product((["", "x"], ["x", ""], [[], [1]]), (False, True)):
            async with asyncio.timeout(5):
                with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
                    await client.completions.create(model="tiny", prompt=prompt, stream=stream)
        rig.check_idle()


NOT_SERVED: list[dict[str, Any]] = [
    {"tools": [{"type": "web_search"}]},
    {"extra_body": {"documents": [{"text": "x"}]}},
    {"reasoning_effort": "low"},
    {"response_format": {"type": "xml"}},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"top_logprobs": 3},
    {"extra_body": {"structured_outputs": {"json": {}, "whitespace_pattern": " "}}},
    {"extra_body": {"ebnf": "root ::= 'x'"}},
    {"extra_body": {"echo": True}},
    {"extra_body": {"chat_template": "x"}},
]


async def test_what_chat_does_not_serve_is_refused_by_name(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for call in NOT_SERVED:
            with pytest.raises(openai.BadRequestError, match="not supported"):
                await client.chat.completions.create(**{"model": "tiny", "messages": USER, **call})


async def test_a_broken_body_is_a_bad_request(valkey_url: str) -> None:
    bodies = [b"", b"{", b"[]", b'{"model": "tiny", "prompt": "\xff"}', b'{"model": 1}', b" " * (5 * 1024 * 1024)]
    bodies.append(b'{"model": "tiny", "prompt": "a\\ud800b"}')
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as http:
        for body in bodies:
            response = await http.post(f"{rig.http}/v1/completions", content=body)

            assert response.status_code == (413 if len(body) > MAX_BODY_BYTES else 400), body[:50]
            assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_compressed_body_is_refused_by_its_encoding(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as http:
        response = await http.post(
            f"{rig.http}/v1/completions", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"}
        )

        assert response.status_code == 415
        assert "Content-Encoding gzip is not served" in response.json()["error"]["message"]


async def test_parts_of_text_are_joined(valkey_url: str) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        await client.chat.completions.create(model="tiny", messages=parts, max_tokens=1)

        prompt = rig.app.catalog.models[0].tokenizer.decode_now(
            list(rig.engine.submits[0].prompt_token_ids), skip_special_tokens=False
        )
        assert prompt.startswith("<|im_start|>system\na\nb<|im_end|>")


async def test_a_client_that_disconnects_aborts_its_request(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.hold_at = 2
        for stream in (True, False):
            call = asyncio.create_task(_read_stream(client, stream=stream))
            await rig.engine.wait_for(lambda: len(rig.engine.submits) > len(rig.engine.aborted_ids))
            call.cancel()
            await rig.engine.wait_for(lambda: len(rig.engine.submits) == len(rig.engine.aborted_ids))
        rig.check_idle()


async def _read_stream(client: Any, *, stream: bool) -> None:
    response = await client.completions.create(model="tiny", prompt="x", max_tokens=9, stream=stream)
    async for _ in response:
        pass


async def test_an_error_after_the_stream_began_is_an_event(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.2) as rig, httpx.AsyncClient() as http:
        rig.engine.hold_at = 2
        body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": True}
        events: list[str] = []
        async with http.stream("POST", f"{rig.http}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not events:
                    await rig.engine.kill()
                if line:
                    events.append(line.removeprefix("data: "))

        assert response.status_code == 200
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "STREAM_INTERRUPTED"


async def test_overload_and_loading_tell_when_to_retry(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as http:
        rig.engine.refuse = AdapterLoadingError("on its way", retry_after_s=1.5)
        response = await http.post(f"{rig.http}/v1/completions", json={"model": "poet", "prompt": "x"})

        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        assert response.json()["error"]["code"] == "ADAPTER_LOADING"


async def test_api_keys_hold_on_http_too(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame vip\n")
    async with running_gateway(valkey_url, api_keys_file=keys) as rig:
        async with client_of(rig, "wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.completions.create(model="tiny", prompt="x")
        async with client_of(rig, "sesame") as client:
            assert [model.id async for model in client.models.list()] == ["tiny", "poet", "poet:prod", "secret"]
            await client.completions.create(model="secret", prompt="x", max_tokens=1)
        assert rig.engine.submits[-1].fairness_key == "vip"


async def test_metrics_and_health(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client, httpx.AsyncClient() as http:
        await client.completions.create(model="poet", prompt="x", max_tokens=3)
        metrics = (await http.get(rig.metrics)).text
        health = await http.get(f"{rig.http}/health")

        assert 'loraplex_gateway_requests_total{adapter="poet",code="OK",model="tiny"} 1.0' in metrics
        assert 'loraplex_gateway_tokens_total{kind="output",tenant="default"} 3.0' in metrics
        assert "loraplex_gateway_ttft_seconds_count 1.0" in metrics
        assert health.status_code == 200
        await rig.engine.kill()
        while rig.app.pool.has_candidate:
            await rig.app.pool.changed.wait()
        assert (await http.get(f"{rig.http}/health")).status_code == 503


async def test_chunks_without_counts_say_so_if_counts_are_asked_for(valkey_url: str) -> None:
    call: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 3, "stream": True}
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        asked = await http.post("/v1/chat/completions", json={**call, "stream_options": {"include_usage": True}})
        plain = await http.post("/v1/chat/completions", json=call)

    chunks, others = (
        [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")]
        for response in (asked, plain)
    )
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert not any("usage" in chunk for chunk in others)
