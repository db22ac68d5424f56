"""Bodies as no client should send them: each gets an answer or a 400 that names the field, never a 500."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from loraplex_gateway.openai import fields
from loraplex_gateway.openai.fields import Rule, Table
from support.gateway_rig import running_gateway

pytestmark = pytest.mark.integration

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 1}
ENDPOINTS = [
    ("/v1/chat/completions", CHAT, fields.CHAT),
    ("/v1/completions", COMPLETION, fields.COMPLETION),
]
# As JSON text, so that what Python has no value for is among them.
VALUES = [
    *("null", "true", "false", "0", "-1", "1", "1.5", "1e-60", "1e400", "-1e400", "9" * 400, '""', '"x"', '"null"'),
    *('"\\u0000"', '"1e999"', "[]", "[null]", "[[]]", "[0, true]", "[-1]", '["x", 1]', '["", ""]', "{}", '{"a": 1}'),
    *('{"1": 1e300}', '{"-1": 1}', '{"1_0": 1}', '{"9999999999999": 1}', '[{"a": {"b": null}}]', '{"type": "text"}'),
]
INTERNAL = re.compile(
    r"sampling\.|stopping\.|response_options|max_new_tokens|min_new_tokens|stop_strings|ListModels|structured_output\."
)


def with_value(body: dict[str, Any], name: str, value: str) -> bytes:
    """Return the body with a field, given as JSON text, instead of the one it has by that or its other name."""
    rest = {key: item for key, item in body.items() if key != name.replace("max_completion_", "max_")}
    return f"{json.dumps(rest)[:-1]}, {json.dumps(name)}: {value}}}".encode()


@pytest.mark.parametrize(("path", "body", "table"), ENDPOINTS, ids=["chat", "completion"])
async def test_every_field_takes_every_value_or_is_named(
    valkey_url: str, path: str, body: dict[str, Any], table: Table
) -> None:
    served = [field.name for field in table.fields.values() if field.rule is Rule.SERVED]
    others = [field.name for field in table.fields.values() if field.rule is not Rule.SERVED]
    calls = [(name, value) for name in served for value in VALUES]
    calls += [(name, VALUES[n % len(VALUES)]) for n, name in enumerate(others * 3)]
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        for name, value in calls:
            response = await http.post(path, content=with_value(body, name, value))

            told = f"{name} = {value[:50]}: {response.status_code} {response.text[:300]}"
            assert response.status_code in (200, 400) or (name == "model" and response.status_code == 404), told
            if response.status_code == 400:
                error = response.json()["error"]
                assert str(error["param"]).startswith(name), told
                assert not INTERNAL.search(error["message"]), told
        rig.check_idle()


NESTED = {
    "response_format": ({"type": "json_schema", "json_schema": {"schema": {}}}, fields.CHAT.nested["response_format"]),
    "structured_outputs": ({}, fields.CHAT.nested["structured_outputs"]),
}


async def test_every_part_of_a_constraint_takes_every_value_or_is_named(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        for outer, (whole, table) in NESTED.items():
            for name, value in ((name, value) for name in table.fields for value in VALUES):
                inner = with_value(whole, name, value).decode().replace("{, ", "{")
                response = await http.post("/v1/completions", content=with_value(COMPLETION, outer, inner))

                told = f"{outer}.{name} = {value[:50]}: {response.status_code} {response.text[:300]}"
                assert response.status_code in (200, 400), told
                if response.status_code == 400:
                    error = response.json()["error"]
                    assert str(error["param"]).startswith((outer, "body")), told
                    assert not INTERNAL.search(error["message"]), told
        rig.check_idle()


async def test_every_part_of_a_message_takes_every_value_or_is_named(valkey_url: str) -> None:
    turn, part = {"role": "user", "content": "x"}, {"type": "text", "text": "x"}
    messages = list(VALUES)
    messages += [
        with_value(turn, name, value).decode() for name in ("role", "content", "name", "tool_calls") for value in VALUES
    ]
    messages += [
        f'{{"role": "user", "content": [{with_value(part, name, value).decode()}]}}'
        for name in ("type", "text")
        for value in VALUES
    ]
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        for message in messages:
            response = await http.post("/v1/chat/completions", content=with_value(CHAT, "messages", f"[{message}]"))

            assert response.status_code in (200, 400), (message, response.text)
            if response.status_code == 400:
                assert str(response.json()["error"]["param"]).startswith("messages"), (message, response.text)
        rig.check_idle()
