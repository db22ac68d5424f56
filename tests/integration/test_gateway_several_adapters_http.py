"""`adapters` in the bodies of every HTTP API: what engines get, and what is refused by name."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex_common.auth import ANYBODY
from loraplex_common.errors import InvalidParameterError
from support.gateway_rig import DIGEST, MODEL_NAME, OTHER_DIGEST, Rig, running_gateway
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

TURNS = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2, "store": False},
    "/v1/messages": {"messages": TURNS, "max_tokens": 2},
}
READERS: dict[str, dict[str, Any]] = {
    "/tokenize": {"messages": TURNS},
    "/v1/messages/count_tokens": {"messages": TURNS},
}
LIST: list[dict[str, Any]] = [{"name": "poet:prod", "weight": 0.5}, {"name": "poet"}]


@asynccontextmanager
async def serving(valkey_url: str) -> AsyncIterator[tuple[Rig, httpx.AsyncClient]]:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        await eventually(lambda: rig.app.names.entry("poet", ANYBODY))
        yield rig, http


async def test_each_api_hands_them_to_the_engine(valkey_url: str) -> None:
    async with serving(valkey_url) as (rig, http):
        for path, body in BODIES.items():
            answer = await http.post(path, json={"model": MODEL_NAME, "adapters": LIST, **body})

            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == MODEL_NAME
            assert answer.json()["system_fingerprint"] == f"{OTHER_DIGEST}+{DIGEST}"
            submit = rig.engine.submits[-1]
            assert (submit.adapter_digest, submit.adapter_scale) == (OTHER_DIGEST, 0.5), path
            assert [term.digest for term in submit.more_adapters] == [DIGEST], path
        for path, body in READERS.items():
            read = await http.post(path, json={"model": MODEL_NAME, "adapters": LIST, **body})
            assert read.status_code == 200, read.text
        rig.check_idle()


async def test_scores_and_choices_are_the_lists(valkey_url: str) -> None:
    async with serving(valkey_url) as (rig, http):
        body = {
            "model": MODEL_NAME,
            "adapters": LIST,
            "prompt": ["a", "b"],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        }
        answer = await http.post("/v1/completions", json={**body, "n": 1})

        assert answer.status_code == 200, answer.text
        assert [len(submit.more_adapters) for submit in rig.engine.submits] == [1, 1]
        assert all(submit.prompt_logprobs == 1 for submit in rig.engine.submits)


async def test_an_empty_list_and_null_are_none(valkey_url: str) -> None:
    async with serving(valkey_url) as (rig, http):
        nothing: tuple[Any, ...] = ([], None)
        for value in nothing:
            for path, body in BODIES.items():
                assert (await http.post(path, json={"model": "poet", "adapters": value, **body})).status_code == 200
            for path, body in READERS.items():
                assert (await http.post(path, json={"model": "poet", "adapters": value, **body})).status_code == 200
            text = await http.post("/detokenize", json={"model": "poet", "tokens": [10], "adapters": value})
            assert text.status_code == 200
        assert {submit.adapter_digest for submit in rig.engine.submits} == {DIGEST}


REFUSALS: list[tuple[str, str, str]] = [
    ('"poet"', "adapters", ""),
    ('{"name": "poet"}', "adapters", ""),
    ('["poet"]', "adapters[0]", ""),
    ("[null]", "adapters[0]", ""),
    ('[{"weight": 1}]', "adapters[0].name", "is missing"),
    ('[{"name": null}]', "adapters[0].name", "is missing"),
    ('[{"name": 1}]', "adapters[0].name", ""),
    ('[{"name": ""}]', "adapters[0].name", "is empty"),
    ('[{"name": "poet", "weight": "1"}]', "adapters[0].weight", ""),
    ('[{"name": "poet", "weight": true}]', "adapters[0].weight", ""),
    ('[{"name": "poet", "weight": -1}]', "adapters[0].weight", "[0, 100]"),
    ('[{"name": "poet", "weight": 100.5}]', "adapters[0].weight", "[0, 100]"),
    ('[{"name": "poet", "weight": 1e400}]', "adapters[0].weight", "[0, 100]"),
    ('[{"name": "poet", "weight": 1' + "0" * 400 + "}]", "adapters[0].weight", ""),
    ('[{"name": "poet", "scale": 1}]', "adapters[0].scale", "unknown field"),
    ('[{"name": "poet"}, {"name": "poet:latest"}]', "adapters[1].name", "add their weights"),
    ("[" + ", ".join(['{"name": "poet"}'] * 9) + "]", "adapters", "at most 8"),
    ('[{"name": "tiny|poet"}]', "adapters[0].name", "no adapter name"),
    ('[{"name": "poet"}], "adapter_scale": 1.0', "adapter_scale", "a weight of its own"),
]


@pytest.mark.parametrize("path", [*BODIES, *READERS])
async def test_what_no_list_may_say_is_refused_by_name(valkey_url: str, path: str) -> None:
    async with serving(valkey_url) as (rig, http):
        head = httpx.Request(
            "POST", "http://x", json={"model": MODEL_NAME, **(BODIES | READERS)[path]}
        ).content.decode()
        for adapters, field, words in REFUSALS:
            if "adapter_scale" in adapters and path in READERS:
                continue  # it is no field there
            content = f'{head[:-1]}, "adapters": {adapters}}}'
            answer = await http.post(path, content=content, headers={"content-type": "application/json"})
            error = answer.json()["error"]
            assert answer.status_code == 400, (adapters, answer.text)
            assert error["param"] == field, (adapters, answer.text)
            assert words in error["message"], (adapters, answer.text)
        nan = await http.post(path, content=f'{head[:-1]}, "adapters": [{{"name": "poet", "weight": NaN}}]}}')
        assert nan.status_code == 400
        assert not rig.engine.submits


@pytest.mark.parametrize("path", [*BODIES, *READERS])
async def test_model_is_the_base_models_name_beside_them(valkey_url: str, path: str) -> None:
    async with serving(valkey_url) as (rig, http):
        for model in ("poet", f"{MODEL_NAME}|poet", "nobody"):
            answer = await http.post(path, json={"model": model, "adapters": LIST, **(BODIES | READERS)[path]})
            error = answer.json()["error"]
            assert answer.status_code == 400, answer.text
            assert error["param"] == "model"
            assert "put the base model's name into model, and all adapters into adapters" in error["message"]
        assert not rig.engine.submits


async def test_an_engines_refusal_of_one_of_them_reaches_the_client(valkey_url: str) -> None:
    async with serving(valkey_url) as (rig, http):
        text = f"adapters: adapter {DIGEST} multiplies what the base model computes; name it alone"
        rig.engine.refuse = InvalidParameterError(text, field="adapters")

        answer = await http.post("/v1/completions", json={"model": MODEL_NAME, "adapters": LIST, "prompt": "x"})

        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "adapters"
        assert error["message"] == (
            f"adapters: adapter 'poet' (revision {DIGEST[:12]}) multiplies what the base model computes; name it alone"
        )


async def test_an_engines_refusal_of_the_scale_names_the_weight_of_a_list_of_one(valkey_url: str) -> None:
    async with serving(valkey_url) as (rig, http):
        text = f"adapter_scale: 0.5 cannot be applied to adapter {DIGEST}; leave adapter_scale out"
        rig.engine.refuse = InvalidParameterError(text, field="adapter_scale")
        asked = {"model": MODEL_NAME, "adapters": [{"name": "poet", "weight": 0.5}], "prompt": "x"}

        error = (await http.post("/v1/completions", json=asked)).json()["error"]

        assert error["param"] == "adapters[0].weight"
        assert error["message"] == (
            f"adapters[0].weight: 0.5 cannot be applied to adapter 'poet' (revision {DIGEST[:12]}); "
            "leave adapters[0].weight out"
        )


async def test_the_document_tells_of_them(valkey_url: str) -> None:
    async with serving(valkey_url) as (_, http):
        schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]

    entry = schemas["BodyAdapter"]
    assert entry["required"] == ["name"]
    weight = next(kind for kind in entry["properties"]["weight"]["anyOf"] if kind["type"] == "number")
    assert (weight["minimum"], weight["maximum"]) == (0, 100)
    for body in ("CompletionBody", "ChatBody", "ResponsesBody", "MessagesBody", "CountTokensBody", "TokenizeBody"):
        assert "adapters" in schemas[body]["properties"], body
    assert "adapters" not in schemas["DetokenizeBody"]["properties"]
