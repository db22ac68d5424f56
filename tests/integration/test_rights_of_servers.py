"""The rights of every role at real servers: one with the right is let in, every other is refused before the handler."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from google.longrunning import operations_pb2
from loraplex.v1 import adapter_store_pb2, engine_pb2, fleet_pb2, gateway_pb2
from loraplex_adapter_store.service import running_store
from loraplex_common.auth import Role
from loraplex_common.errors import LoraplexError, RoleForbiddenError, UnauthenticatedError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.healthcheck import check as check_health
from loraplex_common.kept_status import KeptStatus
from loraplex_common.rights import GATEWAY, RIGHTS
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import running_gateway
from support.lone_engine import running_engine
from support.store_rig import store_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from google.protobuf.descriptor import MethodDescriptor

LINES = [f"key-{role} a-{role} {role}" for role in Role]
PROTOS = (adapter_store_pb2, engine_pb2, fleet_pb2, gateway_pb2, operations_pb2)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for proto in PROTOS
    for service in proto.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
ANSWER_S = 1.0
"""What has let a call in may then say nothing for as long as it likes."""


def of(*services: str) -> list[str]:
    return sorted(method for method in RIGHTS if method.split("/")[1].rpartition(".")[2] in services)


async def outcome(target: str, method: str, key: str | None) -> LoraplexError | None:
    """Make a call with an empty request; return its error, or None if it is answered or under way."""
    async with open_channel(target, api_key=key) as channel:
        descriptor = METHODS[method]
        shapes: dict[tuple[bool, bool], Any] = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        make = shapes[descriptor.client_streaming, descriptor.server_streaming](method)
        request = once() if descriptor.client_streaming else b""
        call = make(request, timeout=ANSWER_S)
        kept = KeptStatus(call)
        try:
            if descriptor.server_streaming:
                async for _ in call:
                    return None
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(kept.behind(error))
        return None


async def once() -> AsyncIterator[bytes]:
    yield b""


async def check(target: str, methods: list[str], key: str | None, roles: set[Role] | None) -> None:
    for method in methods:
        error = await outcome(target, method, key)
        if roles is None:
            assert isinstance(error, UnauthenticatedError), (method, error)
        elif roles & RIGHTS[method]:
            assert not isinstance(error, RoleForbiddenError | UnauthenticatedError), (method, error)
        else:
            assert isinstance(error, RoleForbiddenError), (method, error)
            assert error.metadata["rpc"] == method[1:]
            assert error.metadata["roles_needed"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("\n".join(LINES))
    return path


def roles_of(key: str | None) -> set[Role] | None:
    return None if key in (None, "wrong") else {Role(str(key).removeprefix("key-"))}


KEYS = [*(f"key-{role}" for role in Role), None, "wrong"]


@pytest.fixture(scope="module")
def engine_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "keys").write_text("\n".join(LINES))
    with running_engine(folder, "--api-keys-file", str(folder / "keys")) as process:
        yield process.grpc


@pytest.mark.parametrize("key", KEYS)
async def test_an_engine_asks_for_the_role(engine_target: str, key: str | None) -> None:
    await check(engine_target, of("EngineService"), key, roles_of(key))


@asynccontextmanager
async def store(valkey_url: str, keys: Path) -> AsyncIterator[str]:
    async with running_store(store_config(valkey_url, api_keys_file=keys)) as running:
        yield f"127.0.0.1:{running.grpc_port}"


@pytest.mark.parametrize("key", KEYS)
async def test_a_store_asks_for_the_role(valkey_url: str, keys: Path, key: str | None) -> None:
    async with store(valkey_url, keys) as target:
        await check(target, of("AdapterStoreService", "Operations"), key, roles_of(key))


@pytest.mark.parametrize("key", KEYS)
async def test_a_gateway_asks_for_the_role_on_grpc(valkey_url: str, keys: Path, key: str | None) -> None:
    async with running_gateway(valkey_url, api_keys_file=keys) as rig:
        await check(f"127.0.0.1:{rig.app.grpc_port}", of("GatewayService", "FleetService"), key, roles_of(key))


@pytest.mark.parametrize("role", list(Role))
async def test_a_gateway_asks_for_the_role_on_http(valkey_url: str, keys: Path, role: Role) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    async with running_gateway(valkey_url, api_keys_file=keys) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        http.headers["Authorization"] = f"Bearer key-{role}"
        answers = [
            await http.get("/v1/models"),
            await http.get("/v1/models/tiny"),
            await http.post("/v1/completions", json=body),
            await http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "x"}]}),
        ]

    if role in RIGHTS[GATEWAY + "Generate"]:
        assert {answer.status_code for answer in answers[:3]} == {200}
    else:
        assert {answer.status_code for answer in answers} == {403}
        assert {answer.json()["error"]["reason"] for answer in answers} == {"ROLE_FORBIDDEN"}


async def test_health_is_for_everybody(valkey_url: str, keys: Path) -> None:
    async with store(valkey_url, keys) as target:
        assert await asyncio.to_thread(check_health, target, "liveness") is None
