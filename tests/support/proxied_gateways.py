"""Two gateways in this process that share an engine double, with a real proxy in front of both."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from prometheus_client.parser import text_string_to_metric_families
from support.engine_double import EngineDouble
from support.gateway_rig import Rig, running_gateway, text_request
from support.proxies import Backend, Proxy, running_proxy
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import httpx
    from loraplex_common.errors import LoraplexError

NUM_TOKENS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxied:
    """The objects that a test uses.

    Attributes:
        channel: To the proxy's gRPC port.
        rigs: One for each gateway.
        engine: The only engine.
    """

    proxy: Proxy
    channel: grpc.aio.Channel
    rigs: list[Rig]
    engine: EngineDouble

    @property
    def stub(self) -> gateway_pb2_grpc.GatewayServiceAsyncStub:
        """A client of the gateways, through the proxy."""
        return gateway_pb2_grpc.GatewayServiceStub(self.channel)

    @property
    def num_running(self) -> list[int]:
        """Requests on each gateway."""
        return [rig.app.admission.num_running for rig in self.rigs]

    def check_idle(self) -> None:
        """Raise if a gateway holds anything of a request."""
        for rig in self.rigs:
            rig.check_idle()


@asynccontextmanager
async def two_gateways(valkey_url: str, **overrides: Any) -> AsyncIterator[list[Rig]]:
    """Run two gateways; the first one's engine double is the engine of both."""
    async with running_gateway(valkey_url, **overrides) as first, one_more_gateway(valkey_url, **overrides) as second:
        yield [first, second]


@asynccontextmanager
async def one_more_gateway(valkey_url: str, **overrides: Any) -> AsyncIterator[Rig]:
    """Run a gateway that finds the engine of others."""
    async with running_gateway(valkey_url, num_engines=0, **overrides) as rig:
        pool = rig.app.pool
        await eventually(lambda: any(link.is_candidate for link in pool.links), what="the others' engine found")
        yield rig


def backends(rigs: list[Rig]) -> list[Backend]:
    """Return where a proxy finds gateways."""
    return [Backend(grpc=f"127.0.0.1:{rig.app.grpc_port}", http=f"127.0.0.1:{rig.app.http_port}") for rig in rigs]


@asynccontextmanager
async def proxied(
    kind: str,
    directory: Path,
    valkey_url: str,
    *,
    changes: Mapping[str, str] | None = None,
    **overrides: Any,
) -> AsyncIterator[Proxied]:
    """Run two gateways behind a proxy with its file of deploy/proxies.

    Args:
        kind: One of `support.proxies.KINDS`.
        directory: For the proxy's file and log.
        valkey_url: A real Valkey.
        changes: Texts of the proxy's file to replace besides addresses.
        overrides: Fields of the configuration of both gateways.
    """
    async with AsyncExitStack() as stack:
        rigs = await stack.enter_async_context(two_gateways(valkey_url, **overrides))
        proxy = await stack.enter_async_context(running_proxy(kind, directory, backends(rigs), changes=changes))
        channel = await stack.enter_async_context(open_channel(proxy.grpc))
        yield Proxied(proxy=proxy, channel=channel, rigs=rigs, engine=rigs[0].engine)


def long_text(**fields: Any) -> gateway_pb2.GenerateRequest:
    """Return a request for `NUM_TOKENS` tokens."""
    return text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS), **fields)


def without_retries(target: str) -> grpc.aio.Channel:
    """Return a channel that sends nothing twice."""
    return grpc.aio.insecure_channel(target, options=[("grpc.enable_retries", 0)])


async def read(call: Any) -> list[int]:
    """Read a stream to its end and return its tokens."""
    return [token async for response in call for token in response.chunk.token_ids]


async def failure_of(call: Any) -> LoraplexError:
    """Read a stream that fails and return its error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    return error_from_rpc(caught.value)


async def num_served(http: httpx.AsyncClient, rig: Rig) -> int:
    """Return how many requests a gateway has counted."""
    families = text_string_to_metric_families((await http.get(rig.metrics)).text)
    name = "loraplex_gateway_requests_total"
    return round(sum(sample.value for family in families for sample in family.samples if sample.name == name))
