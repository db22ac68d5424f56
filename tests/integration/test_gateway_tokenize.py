"""/tokenize and /detokenize in vLLM's shapes: the tokens that a generation uses, and their text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex.v1 import gateway_pb2
from support.gateway_rig import MODEL_NAME, Rig, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration
FUNCTION = {"type": "function", "function": {"name": "f"}}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running_gateway(valkey_url) as rig:
        yield rig


async def post(rig: Rig, path: str, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        return await http.post(path, json=body)


@pytest.mark.parametrize("model", [{}, {"model": MODEL_NAME}, {"model": "poet"}, {"model": f"{MODEL_NAME}|poet:prod"}])
async def test_a_text_comes_back_from_its_tokens(rig: Rig, model: dict[str, str]) -> None:
    answer = (await post(rig, "/tokenize", prompt="the quick", **model)).json()
    text = (await post(rig, "/detokenize", tokens=answer["tokens"], **model)).json()

    assert set(answer) == {"count", "max_model_len", "tokens"}
    assert answer["count"] == len(answer["tokens"]) > 0
    assert answer["max_model_len"] == rig.app.pool.max_model_len(rig.app.catalog.models[0].fingerprint)
    assert text["prompt"].endswith("the quick")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "the quick"},
        {"prompt": "the quick", "add_special_tokens": False},
        {"messages": MESSAGES},
        {"messages": MESSAGES, "add_generation_prompt": False},
    ],
)
async def test_the_tokens_are_those_that_a_generation_uses(rig: Rig, body: dict[str, Any]) -> None:
    tokens = (await post(rig, "/tokenize", model=MODEL_NAME, **body)).json()["tokens"]

    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    assert (await post(rig, path, model=MODEL_NAME, max_tokens=1, **body)).status_code == 200

    assert list(rig.engine.submits[0].prompt_token_ids) == tokens


async def test_the_vocabularys_own_strings_come_if_asked_for(rig: Rig) -> None:
    answer = (await post(rig, "/tokenize", prompt="the quick", return_token_strs=True)).json()

    vocabulary = rig.app.catalog.models[0].tokenizer._tokenizer
    assert answer["token_strs"] == [vocabulary.id_to_token(token) for token in answer["tokens"]]


async def test_a_long_text_is_tokenised_as_grpc_does(rig: Rig) -> None:
    text = "lorem ipsum " * 100

    ours = (await post(rig, "/tokenize", prompt=text)).json()["tokens"]

    assert ours == list((await rig.stub.Tokenize(gateway_pb2.TokenizeRequest(text=text))).token_ids)


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, "prompt", "exactly one of prompt and messages"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt", "exactly one of prompt and messages"),
        ("/tokenize", {"prompt": "x", "tools": [FUNCTION]}, "tools", "goes with messages"),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_special_tokens": True},
            "add_special_tokens",
            "goes with prompt only",
        ),
        ("/tokenize", {"messages": MESSAGES, "tools": [{"type": "web"}]}, "tools[0].type", "not supported"),
        ("/tokenize", {"messages": [{"role": "r"}]}, "messages[0].content", "missing"),
        ("/tokenize", {"prompt": "x", "chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ("/tokenize", {"prompt": "x", "promt": "x"}, "promt", "did you mean prompt?"),
        ("/tokenize", {"prompt": "x" * 100_000}, None, "shorten the prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "tokens holds -1"),
        ("/detokenize", {"tokens": [10**6]}, "tokens", "tokens holds 1000000"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]", "int"),
        ("/detokenize", {}, "tokens", "missing"),
    ],
)
async def test_what_cannot_be_tokenised_is_refused_by_name(
    rig: Rig, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    answer = await post(rig, path, **body)

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert param is None or error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_an_adapter_that_is_not_there_is_refused(rig: Rig, path: str) -> None:
    answer = await post(rig, path, model="nobody", **({"prompt": "x"} if path == "/tokenize" else {"tokens": [1]}))

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_configuration_of_the_tokenizer_is_not_served(rig: Rig) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        assert (await http.get("/tokenizer_info")).status_code == 404


async def test_probes_and_load(rig: Rig) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        answers = [await http.get("/ping"), await http.post("/ping"), await http.get("/health")]
        load = await http.get("/load")

    assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "ok")}
    assert load.json() == {"server_load": 0}
