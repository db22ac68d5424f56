"""Claims come and go with their requests."""

from __future__ import annotations

import asyncio

from loraplex_common import valkey
from loraplex_common.registry import claim_key
from loraplex_gateway.claims import RequestClaims


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
