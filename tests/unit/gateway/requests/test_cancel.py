"""A request is cancelled by its id where it runs; elsewhere its gateway is named."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from loraplex_common import valkey
from loraplex_common.errors import NotSupportedError
from loraplex_common.tasks import cancel_and_wait
from loraplex_gateway.requests.claims import RequestClaims
from loraplex_gateway.requests.core import GatewayCore
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def claims(valkey_url: str) -> AsyncIterator[RequestClaims]:
    """Yield the claims of a gateway that lives."""
    client = valkey.connect(valkey_url)
    claims = RequestClaims(client, "one")
    beating = asyncio.create_task(claims.run())
    yield claims
    await cancel_and_wait(beating)
    await claims.close()
    await client.aclose()


def core_of(claims: RequestClaims) -> GatewayCore:
    """Return a core that can cancel."""
    nothing = cast("Any", None)
    return GatewayCore(nothing, nothing, claims, nothing, resumption=nothing, hints=None, metrics=nothing)


async def test_a_request_that_has_just_ended_is_not_said_to_run_on_this_very_gateway(claims: RequestClaims) -> None:
    core = core_of(claims)
    async with claims.hold("t", "r"):
        assert await core.cancel("t", "r")
        await eventually(lambda: claims.owner("t", "r"))

    assert not await core.cancel("t", "r")  # its claim is still being released


async def test_the_gateway_that_runs_a_request_is_named(valkey_url: str, claims: RequestClaims) -> None:
    client = valkey.connect(valkey_url)
    other = RequestClaims(client, "other")
    try:
        async with claims.hold("t", "r"):
            await eventually(lambda: other.owner("t", "r"))
            with pytest.raises(NotSupportedError) as refused:
                await core_of(other).cancel("t", "r")
        assert refused.value.metadata == {"gateway_id": "one"}
    finally:
        await other.close()
        await client.aclose()
