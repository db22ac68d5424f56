"""Claims come and go with their requests."""

from __future__ import annotations

import asyncio
import time

import pytest
from loraplex_common import valkey
from loraplex_common.errors import RequestRunningError
from loraplex_common.registry import claim_key
from loraplex_common.tasks import cancel_and_wait
from loraplex_gateway.requests.claims import LEASE_S, RequestClaims
from support.waiting import eventually


async def test_a_renewal_leaves_no_claim_of_a_request_that_ends_meanwhile(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    claims = RequestClaims(client, "g1")
    try:
        for n in range(20):
            async with claims.hold("t", f"r{n}"):
                renewal = asyncio.create_task(claims._renew())
                await asyncio.sleep(0)
            await renewal
            await claims.close()

            assert await client.get(claim_key("t", f"r{n}")) is None
    finally:
        await client.aclose()


async def test_two_tenants_claims_never_collide(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    one, other = RequestClaims(client, "one"), RequestClaims(client, "other")
    beating = [asyncio.create_task(claims.run()) for claims in (one, other)]
    try:
        async with one.hold("team", "prod:77"), other.hold("team:prod", "77"):
            # A claim that Valkey was too busy for is made good at its renewal.
            assert await eventually(lambda: other.owner("team", "prod:77")) == "one"
            assert await eventually(lambda: one.owner("team:prod", "77")) == "other"
    finally:
        await cancel_and_wait(*beating)
        await asyncio.gather(one.close(), other.close())
        await client.aclose()


async def test_the_claims_of_a_gateway_that_is_gone_are_free_within_seconds(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    lost, other = RequestClaims(client, "lost"), RequestClaims(client, "other")
    beating = asyncio.create_task(lost.run())
    try:
        held = lost.hold("t", "r")
        await held.__aenter__()
        with pytest.raises(RequestRunningError):
            async with other.hold("t", "r"):
                pass
        assert await other.owner("t", "r") == "lost"

        await cancel_and_wait(beating)  # killed: nothing is released
        killed_at, refusals = time.monotonic(), 0
        while True:
            try:
                async with other.hold("t", "r"):
                    assert await client.get(claim_key("t", "r")) == b"other"
                break
            except RequestRunningError:
                refusals += 1
                await asyncio.sleep(0.1)

        assert refusals
        assert time.monotonic() - killed_at < 5.0
        assert LEASE_S > 20
    finally:
        await other.close()
        await client.aclose()


async def test_the_claims_of_a_gateway_that_closes_are_free_at_once(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    closed, other = RequestClaims(client, "closed"), RequestClaims(client, "other")
    try:
        held = closed.hold("t", "r")
        await held.__aenter__()
        await closed.close()

        async with other.hold("t", "r"):
            assert await other.owner("t", "r") == "other"
        await other.close()
        assert await client.get(claim_key("t", "r")) is None
    finally:
        await client.aclose()


async def test_a_gateway_that_comes_back_takes_no_claim_that_another_holds_now(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    frozen, other = RequestClaims(client, "frozen"), RequestClaims(client, "other")
    try:
        held = frozen.hold("t", "r")
        await held.__aenter__()
        await frozen.close()  # as if it had been frozen for longer than it may
        async with other.hold("t", "r"):
            await frozen._renew()
            await held.__aexit__(None, None, None)
            await frozen.close()

            assert await client.get(claim_key("t", "r")) == b"other"
        await other.close()
    finally:
        await client.aclose()
