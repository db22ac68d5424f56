"""Structured output through /v1/responses and /v1/messages: the constraint that the engine gets, the object that comes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import openai
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import InvalidParameterError
from pydantic import BaseModel
from support.gateway_rig import Rig, running_gateway
from support.said import saying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


class Person(BaseModel):
    name: str
    age: int


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BOB = Person(name="Bob", age=3)


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running_gateway(valkey_url, reply=saying('{"name": "Bob", "age": 3}')) as rig:
        rig.engine.finish = gateway_pb2.FINISH_REASON_STOP
        yield rig


def schema_of(rig: Rig) -> Any:
    return json.loads(rig.engine.submits[-1].structured_output.json_schema)


async def test_openais_parse_gets_its_object(rig: Rig) -> None:
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="none", max_retries=0) as client:
        response = await client.responses.parse(model="tiny", input="who?", text_format=Person)
        async with client.responses.stream(model="tiny", input="who?", text_format=Person) as stream:
            streamed = await stream.get_final_response()

    assert response.output_parsed == streamed.output_parsed == BOB
    assert set(schema_of(rig)["properties"]) == {"name", "age"}
    echoed: Any = response.text
    assert (echoed.format.type, echoed.format.name, echoed.format.strict) == ("json_schema", "Person", True)


async def test_anthropics_parse_gets_its_object(rig: Rig) -> None:
    messages: Any = [{"role": "user", "content": "who?"}]
    async with anthropic.AsyncAnthropic(base_url=rig.http, api_key="none", max_retries=0) as client:
        message = await client.messages.parse(model="tiny", max_tokens=99, messages=messages, output_format=Person)

    assert message.parsed_output == BOB
    assert set(schema_of(rig)["properties"]) == {"name", "age"}


async def test_json_without_a_schema_is_any_object(rig: Rig) -> None:
    async with httpx.AsyncClient() as http:
        body = {"model": "tiny", "input": "x", "text": {"format": {"type": "json_object"}}}
        answer = await http.post(f"{rig.http}/v1/responses", json=body)

    assert answer.json()["text"]["format"] == {"type": "json_object"}
    assert rig.engine.submits[-1].structured_output.json_object


async def test_a_schema_that_cannot_be_compiled_is_refused_under_the_bodys_own_name(rig: Rig) -> None:
    rig.engine.refuse = InvalidParameterError(
        "structured_output: keyword unevaluatedItems is not supported", field="structured_output"
    )
    async with httpx.AsyncClient() as http:
        described = {"type": "json_schema", "name": "n", "schema": SCHEMA}
        body: dict[str, Any] = {"model": "tiny", "input": "x", "text": {"format": described}}
        response = (await http.post(f"{rig.http}/v1/responses", json=body)).json()["error"]
        body = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
        body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
        message = (await http.post(f"{rig.http}/v1/messages", json=body)).json()["error"]

    assert response["param"] == "text.format.schema"
    assert message["param"] == "output_config.format.schema"
    for told in (response, message):
        assert told["message"] == f"{told['param']}: keyword unevaluatedItems is not supported"


async def test_two_constraints_are_refused(rig: Rig) -> None:
    async with httpx.AsyncClient() as http:
        body = {"model": "tiny", "input": "x", "text": {"format": {"type": "json_object"}}, "guided_regex": "a"}
        error = (await http.post(f"{rig.http}/v1/responses", json=body)).json()["error"]

    assert error["message"] == "guided_regex and text.format both constrain the output; send one of them"
