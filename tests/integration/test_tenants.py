"""Tenants of one gateway: none learns of another's adapters and requests, none takes a class that its key does not give."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.auth import Principal
from loraplex_common.errors import AdapterNotFoundError, LoraplexError, PriorityForbiddenError, RequestRunningError
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.openai.app import endpoints
from loraplex_gateway.openai.endpoint import Endpoint
from support.gateway_rig import DIGEST, MODEL_NAME, OTHER_DIGEST, Rig, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_gateway.openai.context import HttpContext

pytestmark = pytest.mark.integration
KEYS = """
key-me me
key-vip vip
key-ops ops admin
key-slow slow priority=batch
key-fast fast priority=high
key-team team
key-prod team:prod
key-scraper prometheus metrics
key-engine engine-1 engine
key-gateway gateway-2 gateway
"""
VIP = Principal(name="vip")
Once = gateway_pb2.GenerateOnceRequest


def as_(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer key-{name}"),)


def http_as(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer key-{name}"}


@pytest.fixture
async def rig(valkey_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    async with running_gateway(valkey_url, api_keys_file=keys) as rig:
        yield rig


@asynccontextmanager
async def refused(*, within_s: tuple[float, float] = (0.0, 20.0)) -> AsyncIterator[list[LoraplexError]]:
    errors: list[LoraplexError] = []
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield errors
    assert within_s[0] <= time.monotonic() - began <= within_s[1]
    errors.append(error_from_rpc(caught.value))


def shape(error: LoraplexError, name: str) -> tuple[Any, ...]:
    """Return all that an error says, but for the name that was asked for."""
    metadata = {key: value.replace(name, "NAME") for key, value in error.metadata.items()}
    said = error.message.replace(name, "NAME")
    return type(error), error.code, said, metadata, error.violations, error.retry_after_s, error.drop_reason


@pytest.mark.parametrize("suffix", ["", ":latest", ":nope", f"@{DIGEST}", f"@{OTHER_DIGEST}", f"@{DIGEST[:8]}"])
async def test_a_restricted_adapter_is_refused_as_one_that_does_not_exist(rig: Rig, suffix: str) -> None:
    shapes = []
    for name in ("secret", "sxcrxt"):
        request = text_request(adapter=f"{name}{suffix}")
        async with refused(within_s=(0.2, 20.0)) as generated:
            await rig.stub.GenerateOnce(Once(request=request), metadata=as_("me"), timeout=20)
        async with refused(within_s=(0.2, 20.0)) as described:
            await rig.stub.GetModel(gateway_pb2.GetModelRequest(name=request.adapter), metadata=as_("me"), timeout=20)
        shapes.append([shape(error, name) for error in (*generated, *described)])

    assert shapes[0] == shapes[1]
    assert shapes[0][0][0] is AdapterNotFoundError
    assert rig.engine.submits == []


@pytest.mark.parametrize("suffix", ["", ":latest", f"@{DIGEST}"])
async def test_so_it_is_over_http(rig: Rig, suffix: str) -> None:
    answers = []
    async with httpx.AsyncClient(base_url=rig.http, headers=http_as("me")) as http:
        for name in ("secret", "sxcrxt"):
            body = {"model": f"{name}{suffix}", "prompt": "x", "max_tokens": 1}
            posted = await http.post("/v1/completions", json=body)
            got = await http.get(f"/v1/models/{name}{suffix}")
            answers.append([(answer.status_code, answer.text.replace(name, "NAME")) for answer in (posted, got)])

    assert answers[0] == answers[1]
    assert [status for status, _ in answers[0]] == [404, 404]


async def test_lists_have_what_their_reader_may_use(rig: Rig) -> None:
    async def listed(name: str) -> list[str]:
        models = await rig.stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=as_(name))
        async with httpx.AsyncClient(base_url=rig.http, headers=http_as(name)) as http:
            data = (await http.get("/v1/models")).json()["data"]
        names = [card.name for card in models.models]
        assert [card["id"] for card in data if ":" not in card["id"]] == names
        return [card["id"] for card in data]

    assert await listed("me") == [MODEL_NAME, "poet", "poet:prod"]
    assert await listed("vip") == await listed("ops") == [MODEL_NAME, "poet", "poet:prod", "secret"]


@pytest.mark.parametrize("name", ["vip", "ops"])
async def test_an_administrators_key_uses_restricted_adapters_as_its_tenants_do(rig: Rig, name: str) -> None:
    answer = await rig.stub.GenerateOnce(Once(request=text_request(adapter="secret")), metadata=as_(name), timeout=20)
    card = await rig.stub.GetModel(gateway_pb2.GetModelRequest(name="secret"), metadata=as_(name))

    assert answer.started.adapter_revision == card.model.revision == DIGEST


async def test_a_name_that_is_the_bases_too_means_the_base_to_who_may_not_use_the_adapter(rig: Rig) -> None:
    rig.store.put(MODEL_NAME, {"latest": DIGEST}, fingerprint=rig.engine.base.fingerprint, allowed=["vip"])
    await eventually(lambda: any(entry.name == MODEL_NAME for entry in rig.app.names.visible_to(VIP)))

    async with httpx.AsyncClient(base_url=rig.http) as http:
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 1}
        mine = await http.post("/v1/completions", json=body, headers=http_as("me"))
        theirs = await http.post("/v1/completions", json=body, headers=http_as("vip"))

    assert (mine.status_code, theirs.status_code) == (200, 400)
    assert rig.engine.submits[-1].adapter_digest == ""


async def test_anothers_request_is_as_one_that_does_not_run(rig: Rig) -> None:
    rig.engine.hold_at = 2
    call = rig.stub.Generate(text_request(request_id="theirs"), metadata=as_("vip"))
    await call.read()

    for request_id in ("theirs", "nobodys"):
        cancel = gateway_pb2.CancelRequestRequest(request_id=request_id)
        for name in ("me", "ops"):
            assert not (await rig.stub.CancelRequest(cancel, metadata=as_(name))).was_running
    async with refused() as errors:
        await rig.stub.GenerateOnce(Once(request=text_request(request_id="theirs")), metadata=as_("vip"))
    assert isinstance(errors[0], RequestRunningError)
    rig.engine.release()
    assert (await rig.stub.GenerateOnce(Once(request=text_request(request_id="theirs")), metadata=as_("me"))).finished
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_ids_of_two_tenants_that_read_alike_with_their_names_run_side_by_side(
    rig: Rig, valkey_url: str, tmp_path: Path
) -> None:
    async with running_gateway(valkey_url, api_keys_file=tmp_path / "keys") as other:
        for engine in (*rig.engines, *other.engines):
            engine.hold_at = 2
        first = rig.stub.Generate(text_request(request_id="prod:77"), metadata=as_("team"))
        second = other.stub.Generate(text_request(request_id="77"), metadata=as_("prod"))

        for call in (first, second):
            response: Any = await call.read()
            assert response.HasField("started")

        for engine in (*rig.engines, *other.engines):
            engine.release()
        for call in (first, second):
            while await call.read() is not grpc.aio.EOF:
                pass


@pytest.mark.parametrize(("name", "priority"), [("me", "high"), ("slow", "high"), ("slow", "normal")])
async def test_a_class_above_the_keys_is_refused_on_both_ports(rig: Rig, name: str, priority: str) -> None:
    wanted = gateway_pb2.Priority.Value(f"PRIORITY_{priority.upper()}")
    async with refused() as errors:
        await rig.stub.GenerateOnce(Once(request=text_request(priority=wanted)), metadata=as_(name), timeout=20)
    async with httpx.AsyncClient(base_url=rig.http, headers=http_as(name)) as http:
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 1, "priority": priority}
        answer = await http.post("/v1/completions", json=body)

    assert isinstance(errors[0], PriorityForbiddenError)
    assert f"priority={priority}" in errors[0].message
    assert (answer.status_code, answer.json()["error"]["reason"]) == (403, "PRIORITY_FORBIDDEN")
    assert rig.engine.submits == []


@pytest.mark.parametrize(
    ("name", "asked", "granted"),
    [("slow", 0, 1), ("slow", 1, 1), ("me", 0, 2), ("me", 2, 2), ("fast", 0, 2), ("fast", 3, 3), ("ops", 3, 3)],
)
async def test_a_class_up_to_the_keys_is_what_the_engine_hears(rig: Rig, name: str, asked: int, granted: int) -> None:
    request = text_request(priority=gateway_pb2.Priority.ValueType(asked))

    await rig.stub.GenerateOnce(Once(request=request), metadata=as_(name), timeout=20)

    assert rig.engine.submits[-1].priority == granted


async def test_what_the_engine_shares_and_routes_by_is_a_tenants_own(rig: Rig) -> None:
    for name in ("me", "vip", "me"):
        request = text_request(cache_salt="salt", affinity_key="user-1")
        await rig.stub.GenerateOnce(Once(request=request), metadata=as_(name), timeout=20)
    await rig.stub.GenerateOnce(Once(request=text_request()), metadata=as_("me"), timeout=20)

    mine, theirs, again, unsalted = (submit.cache_salt for submit in rig.engine.submits)
    assert mine == again
    assert len({mine, theirs, unsalted}) == 3


ASKING = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL_NAME}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
]
ADMINS_ALONE = [("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")]


@pytest.mark.parametrize(("method", "path"), ASKING)
async def test_every_route_but_health_asks_who_calls(rig: Rig, method: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        answers = [
            await http.request(method, path, headers=headers)
            for headers in ({}, {"authorization": "Bearer guess"}, {"authorization": "Basic a2V5LW1l"})
        ]
        others = [await http.request(method, path, headers=http_as(name)) for name in ("scraper", "engine", "gateway")]
        assert (await http.get("/health")).status_code == 200

    assert {(answer.status_code, answer.headers.get("www-authenticate")) for answer in answers} == {(401, "Bearer")}
    assert {answer.status_code for answer in others} == {403}
    assert all("it takes the role admin or tenant" in answer.json()["error"]["message"] for answer in others)


@pytest.mark.parametrize(("method", "path"), ADMINS_ALONE)
async def test_a_tenant_or_a_service_changes_no_adapters(rig: Rig, method: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        answers = [await http.request(method, path, headers=http_as(name)) for name in ("me", "engine", "gateway")]
        stranger = await http.request(method, path)

    assert stranger.status_code == 401
    assert {answer.status_code for answer in answers} == {403}
    assert all("it takes the role admin" in answer.json()["error"]["message"] for answer in answers)


def test_these_are_all_routes_but_health_and_the_sign_to_the_metrics() -> None:
    known = endpoints(cast("HttpContext", SimpleNamespace()))

    asking = [endpoint for endpoint in known if isinstance(endpoint, Endpoint)]
    paths = {endpoint.path for endpoint in asking if endpoint.is_served}

    assert {endpoint.path for endpoint in known} - {endpoint.path for endpoint in asking} == {
        "/health",
        "/healthz",
        "/ping",
        "/metrics",
        "/openapi.json",
    }
    assert paths == {path.replace(MODEL_NAME, "{name:path}") for _, path in ASKING + ADMINS_ALONE}
