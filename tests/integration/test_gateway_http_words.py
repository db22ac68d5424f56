"""Errors over HTTP speak of bodies and routes: no name that only the gRPC API has, whatever went wrong."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.errors import LoraplexError
from loraplex_engine.rpc import wire
from loraplex_engine.rpc.validation import RequestLimits
from loraplex_gateway.openai import fields
from loraplex_gateway.requests.validation import RANGES
from support.gateway_rig import running_gateway
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4}
CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
KEYS = "root-key root admin\nacme-key acme priority=normal\nmetrics-key prometheus metrics\n"


def names_of_grpc() -> set[str]:
    """Return the names of calls, services and messages' fields that no body or route has."""
    messages = [engine_pb2.Submit, gateway_pb2.GenerateRequest, gateway_pb2.SamplingParams, gateway_pb2.StoppingParams]
    messages += [gateway_pb2.ResponseOptions, gateway_pb2.Resume, gateway_pb2.StructuredOutput]
    found = {field.name for message in messages for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]
    found = {name for name in found if "_" in name} - set(fields.CHAT.fields) - set(fields.COMPLETION.fields)
    found -= set(fields.CHAT.nested["response_format"].fields) | set(fields.CHAT.nested["structured_outputs"].fields)
    for file in (engine_pb2, gateway_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            found |= {service.name, *(method.name for method in service.methods)}
    return found


GRPC_ONLY: Final = re.compile(
    rf"\b(?:{'|'.join(sorted(names_of_grpc()))})\b|\b(?:sampling|stopping|resume)\.|\bgRPC\b|\bRPC\b|LOAD_POLICY"
)


@asynccontextmanager
async def open_rig(valkey_url: str, tmp_path: Path, **overrides: Any) -> AsyncIterator[tuple[Rig, httpx.AsyncClient]]:
    keys, quotas = tmp_path / "keys", tmp_path / "quotas.toml"
    keys.write_text(KEYS)
    quotas.write_text("[tenants.acme]\nrequests_per_minute = 1\n")
    flags = {"api_keys_file": keys, "quotas_file": quotas, **overrides}
    async with (
        running_gateway(valkey_url, **flags) as rig,
        httpx.AsyncClient(base_url=rig.http, headers={"authorization": "Bearer root-key"}) as http,
    ):
        yield rig, http


def check(response: httpx.Response, status: int, code: str, asked: object = None) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), (asked, error)
    told = [error["message"], error["param"] or "", *(each["message"] for each in error.get("violations", []))]
    told += [each["field"] for each in error.get("violations", [])]
    assert [text for text in told if GRPC_ONLY.search(text)] == [], (asked, error)
    return error


BODIES: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "model_not_found"),
    ({"model": "stranger"}, 422, "ADAPTER_INCOMPATIBLE"),
    ({"model": "tiny:"}, 400, "invalid_value"),
    ({"model": ""}, 400, "invalid_value"),
    ({"frobnicate": 1}, 400, "unknown_parameter"),
    ({"use_beam_search": True}, 400, "unsupported_value"),
    ({"lora_path": "x"}, 400, "unsupported_parameter"),
    ({"temperature": "warm"}, 400, "invalid_type"),
    ({"priority": "soon"}, 400, "invalid_value"),
    ({"max_tokens": 4, "min_tokens": 5}, 400, "invalid_value"),
    ({"min_tokens": 2, "max_tokens": 3, "allowed_token_ids": [9], "stop_token_ids": [9]}, 400, "invalid_value"),
    ({"logit_bias": {"99999": 1}}, 400, "invalid_value"),
    ({"stop_token_ids": [99999]}, 400, "invalid_value"),
    ({"stop": ["x"] * 17}, 400, "invalid_value"),
    ({"bad_words": ["x" * 300]}, 400, "invalid_value"),
    ({"truncate_prompt_tokens": 0}, 400, "invalid_value"),
    ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, 400, "invalid_value"),
    ({"request_id": "a b"}, 400, "invalid_value"),
    ({"adapter_scale": 0.5}, 400, "invalid_value"),
    ({"max_tokens": 10**6}, 400, "context_length_exceeded"),
]
ONLY_COMPLETIONS: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": None}, 400, "missing_required_parameter"),
    ({"prompt": [5] * 600}, 400, "context_length_exceeded"),
    ({"prompt": "x" * 10**6}, 400, "context_length_exceeded"),
    ({"prompt": [99999]}, 400, "invalid_value"),
    ({"prompt": [[]]}, 400, "invalid_value"),
    ({"logprobs": 21}, 400, "invalid_value"),
    ({"prompt_logprobs": -1}, 400, "invalid_value"),
]


async def test_what_is_wrong_with_a_body_is_told_in_its_words(valkey_url: str, tmp_path: Path) -> None:
    ranges = [(name, value) for name in body_names_of_ranges() for value in (-1000, 10**9)]
    async with open_rig(valkey_url, tmp_path) as (rig, http):
        for asked, status, code in [*BODIES, *ONLY_COMPLETIONS]:
            response = await http.post(COMPLETION_PATH, json={**COMPLETION, **asked})
            check(response, status, code, asked)
        for asked, status, code in BODIES:
            check(await http.post(CHAT_PATH, json={**CHAT, **asked}), status, code, asked)
        for name, value in ranges:
            response = await http.post(COMPLETION_PATH, json={**COMPLETION, "model": "poet", name: value})
            if response.status_code == 400:
                error = check(response, 400, response.json()["error"]["code"], name)
                assert error["param"] == name
        error = check(await http.post(COMPLETION_PATH, content=b"{"), 400, "invalid_value")
        assert error["param"] == "body"
        rig.check_idle()


def body_names_of_ranges() -> set[str]:
    by_core = {core: field.name for field in fields.COMPLETION.fields.values() for core in field.core}
    return {by_core[rule.field] for rule in RANGES}


ENGINE_REFUSES: list[engine_pb2.Submit] = [
    engine_pb2.Submit(prompt_token_ids=[1] * 600),
    engine_pb2.Submit(prompt_token_ids=[10**6]),
    engine_pb2.Submit(prompt_token_ids=[1], sampling=gateway_pb2.SamplingParams(seed=1, top_p=3)),
    engine_pb2.Submit(
        prompt_token_ids=[1],
        sampling=gateway_pb2.SamplingParams(seed=1),
        stopping=gateway_pb2.StoppingParams(max_new_tokens=1, min_new_tokens=2),
    ),
]


async def test_what_an_engine_refuses_is_told_in_the_words_of_the_body(valkey_url: str, tmp_path: Path) -> None:
    limits = RequestLimits(vocab_size=1000, max_model_len=512)
    async with open_rig(valkey_url, tmp_path) as (rig, http):
        for submit in ENGINE_REFUSES:
            with pytest.raises(LoraplexError) as caught:
                wire.submission(submit, session_id=1, limits=limits, now_s=0.0)
            rig.engine.refuse = caught.value
            for path, body in ((CHAT_PATH, CHAT), (COMPLETION_PATH, COMPLETION)):
                check(await http.post(path, json=body), 400, "invalid_value", caught.value.message)
                response = await http.post(path, json={**body, "stream": True})
                check(response, 400, "invalid_value", caught.value.message)


async def test_who_may_not_is_told_so_by_the_route(valkey_url: str, tmp_path: Path) -> None:
    metrics = {"authorization": "Bearer metrics-key"}
    acme = {"authorization": "Bearer acme-key"}
    async with open_rig(valkey_url, tmp_path) as (_, http):
        for path, route in (("/v1/models", "GET /v1/models"), ("/v1/models/tiny", "GET /v1/models/{model}")):
            error = check(await http.get(path, headers=metrics), 403, "ROLE_FORBIDDEN")
            assert f"may not call {route}:" in error["message"]
        error = check(await http.post(COMPLETION_PATH, json=COMPLETION, headers=metrics), 403, "ROLE_FORBIDDEN")
        assert "POST /v1/completions" in error["message"]
        for name in ("load", "unload"):
            path = f"/v1/{name}_lora_adapter"
            error = check(await http.post(path, json={}, headers=acme), 403, "ROLE_FORBIDDEN")
            assert f"may not call POST {path}:" in error["message"]
        check(await http.get("/v1/models", headers={"authorization": "Bearer x"}), 401, "invalid_api_key")
        check(await http.get("/v1/models/nobody"), 404, "model_not_found")
        check(await http.get("/v1/models/a%20b"), 404, "model_not_found")
        high = {**COMPLETION, "priority": "high"}
        check(await http.post(COMPLETION_PATH, json=high, headers=acme), 403, "PRIORITY_FORBIDDEN")
        assert (await http.post(COMPLETION_PATH, json=COMPLETION, headers=acme)).status_code == 200
        check(await http.post(COMPLETION_PATH, json=COMPLETION, headers=acme), 429, "rate_limit_exceeded")


async def test_what_comes_of_a_busy_or_lost_engine_is_told_in_http_words(valkey_url: str, tmp_path: Path) -> None:
    async with open_rig(valkey_url, tmp_path, max_concurrent_requests=1, max_queued_requests=1) as (rig, http):
        rig.engine.hold_at = 1
        running = asyncio.create_task(http.post(COMPLETION_PATH, json={**COMPLETION, "request_id": "r-1"}))
        await rig.engine.wait_for(lambda: bool(rig.engine.submits))

        twice = await http.post(COMPLETION_PATH, json={**COMPLETION, "request_id": "r-1"})
        assert "resume" not in check(twice, 409, "REQUEST_RUNNING")["message"]
        late = await http.post(COMPLETION_PATH, json={**COMPLETION, "queue_timeout": 0.05})
        check(late, 429, "rate_limit_exceeded")
        waiting = asyncio.create_task(http.post(COMPLETION_PATH, json=COMPLETION))
        await eventually(lambda: rig.app.admission.num_waiting == 1)
        check(await http.post(COMPLETION_PATH, json=COMPLETION), 429, "rate_limit_exceeded")
        rig.engine.release()
        assert [(await each).status_code for each in (running, waiting)] == [200, 200]


def test_the_names_are_found_where_they_are() -> None:
    told = [
        "stopping.max_new_tokens is 0",
        "call ListModels",
        "sampling.top_p",
        "ask gRPC",
        "response_options.logprobs",
    ]

    assert [text for text in told if not GRPC_ONLY.search(text)] == []
    assert GRPC_ONLY.search(json.dumps({"message": "max_tokens and prompt of POST /v1/completions"})) is None
