"""Gateways with a quotas file, and callers of theirs."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import openai
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import TenantQuotaError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import Rig, running_gateway, text_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

Once = gateway_pb2.GenerateOnceRequest
KEYS = "acme-key acme\nrival-key rival\nroot-key root admin\n"


@asynccontextmanager
async def limited(url: str, tmp_path: Path, quotas: str, **overrides: Any) -> AsyncIterator[Rig]:
    """Run a gateway with tenants acme and rival."""
    keys, file = tmp_path / "keys", tmp_path / "quotas.toml"
    keys.write_text(KEYS)
    if not file.exists():
        written(tmp_path, quotas)
    async with running_gateway(url, api_keys_file=keys, quotas_file=file, **overrides) as rig:
        yield rig
        assert rig.app.quotas.accounts is not None
        rig.app.quotas.accounts.check_idle()


def written(folder: Path, quotas: str) -> Path:
    """Return a quotas file."""
    file = folder / "quotas.toml"
    file.write_text(quotas)
    return file


@asynccontextmanager
async def caller(rig: Rig, key: str = "acme-key") -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
    async with open_channel(f"127.0.0.1:{rig.app.grpc_port}", api_key=key) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


def client_of(rig: Rig, key: str = "acme-key") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key=key, max_retries=0)


async def refusal(call: Any) -> TenantQuotaError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_from_rpc(caught.value)
    assert isinstance(error, TenantQuotaError), error
    return error


async def outcome(stub: gateway_pb2_grpc.GatewayServiceAsyncStub) -> str:
    """Return the reason that a request is refused with, or OK."""
    try:
        await stub.GenerateOnce(Once(request=text_request()))
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error).reason
    return "OK"


async def is_now(stub: gateway_pb2_grpc.GatewayServiceAsyncStub, expected: str) -> bool:
    return await outcome(stub) == expected
