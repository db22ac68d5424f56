"""Calls that must be made, by a tiny model of random weights on a real engine: every one of them parses."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from loraplex_client import Client
from support.stack_fixtures import TINY_RECIPES, import_all
from support.tool_campaign import run_tool_campaign, write_callers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.stack import Stack

pytestmark = pytest.mark.integration

SET_LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "strict": True,
        "parameters": {
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "lamp"}}


def is_of_schema(arguments: str) -> bool:
    value = json.loads(arguments)
    return isinstance(value["on"], bool)


async def test_a_forced_call_always_parses_whatever_the_model(tiny_stack: Stack) -> None:
    import_all(tiny_stack)
    async with openai.AsyncOpenAI(
        base_url=f"http://{tiny_stack.gateway.addresses['http']}/v1", api_key="none", max_retries=0
    ) as client:
        num_ended = 0
        models = [tiny_stack.model.name, *TINY_RECIPES]
        for seed, model in enumerate(models * 2):
            asked: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": "on"}],
                "tools": [SET_LAMP],
                "tool_choice": NAMED if seed % 2 else "required",
                "parallel_tool_calls": False,
                "temperature": 1.5,
                "seed": seed,
                "n": 2,
            }
            answer = await client.chat.completions.create(**asked)
            for choice in answer.choices:
                if choice.finish_reason == "length":  # blanks, for want of room in 512 tokens
                    continue
                (call,) = choice.message.tool_calls or []
                num_ended += 1
                assert choice.message.content is None
                assert choice.finish_reason == ("stop" if seed % 2 else "tool_calls")
                assert call.type == "function"
                assert call.function.name == "lamp"
                assert is_of_schema(call.function.arguments)
        assert num_ended >= 4


@pytest.fixture(scope="module")
def callers(tiny_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """Format -> names of adapters that bring its template."""
    directory = tmp_path_factory.mktemp("callers")
    names = write_callers(directory, tiny_stack.model, [TINY_RECIPES["tiny-a"]])
    with Client(tiny_stack.gateway.grpc, store_target=tiny_stack.store.grpc) as client:
        for name in itertools.chain(*names.values()):
            client.adapters.upload(name, directory / name)
        yield names
        for name in itertools.chain(*names.values()):
            client.adapters.delete(name)


async def test_calls_of_strict_functions_are_valid_and_those_that_are_cut_begin_valid_ones(
    tiny_stack: Stack, callers: dict[str, list[str]]
) -> None:
    tally = await run_tool_campaign(tiny_stack, callers, numbers=range(30), seed=5)
    assert tally.wrong == {}
    assert tally.num_requests == 30
    assert tally.num_whole >= 24, tally
    assert tally.num_calls >= 15, tally


GOOD = {"type": "object", "properties": {"a": {"type": "integer"}}}
NOT = {"type": "object", "properties": {"a": {"not": {}}}}
NOTHING = {"type": "object", "properties": {"a": {"allOf": [{"type": "null"}, {"type": "string"}]}}, "required": ["a"]}
OF_API = {
    "/v1/chat/completions": "tools[{}].function.parameters",
    "/v1/responses": "tools[{}].parameters",
    "/v1/messages": "tools[{}].input_schema",
}


def _asked(path: str, schemas: list[dict[str, Any]], choice: str) -> dict[str, Any]:
    """Return a body that offers functions a, b, c ... and forces one, by its name or any."""
    names = "abcdef"[: len(schemas)]
    turns = [{"role": "user", "content": "on"}]
    if path == "/v1/responses":
        tools: list[Any] = [
            {"type": "function", "name": n, "parameters": schema} for n, schema in zip(names, schemas, strict=True)
        ]
        forced: Any = choice if choice == "required" else {"type": "function", "name": choice}
        return {"input": "on", "tools": tools, "tool_choice": forced}
    if path == "/v1/messages":
        tools = [{"name": n, "input_schema": schema} for n, schema in zip(names, schemas, strict=True)]
        forced = {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}
        return {"messages": turns, "tools": tools, "tool_choice": forced, "max_tokens": 8}
    functions = [{"name": n, "parameters": schema} for n, schema in zip(names, schemas, strict=True)]
    tools = [{"type": "function", "function": function} for function in functions]
    forced = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    return {"messages": turns, "tools": tools, "tool_choice": forced, "max_tokens": 8}


@pytest.mark.parametrize("path", list(OF_API))
@pytest.mark.parametrize(("bad", "reason"), [(NOT, "keyword 'not' at #/properties/a"), (NOTHING, "no value satisfies")])
@pytest.mark.parametrize("choice", ["required", "c"])
async def test_a_function_whose_schema_cannot_be_compiled_is_named(
    tiny_stack: Stack, callers: dict[str, list[str]], path: str, bad: dict[str, Any], reason: str, choice: str
) -> None:
    url = f"http://{tiny_stack.gateway.addresses['http']}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        body = _asked(path, [GOOD, GOOD, bad, GOOD], choice)
        response = await http.post(path, json={"model": callers["hermes"][0], **body})

    field = OF_API[path].format(2)
    assert response.status_code == 400
    assert f"{field}: " in response.json()["error"]["message"]
    assert reason in response.json()["error"]["message"]
    assert response.json()["error"].get("param", field) == field
