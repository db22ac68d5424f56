"""A client of Valkey ends when its task is cancelled, whenever that is."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from loraplex_common import valkey
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from redis.asyncio import Redis

# More turns of the event loop than a command takes: a cancellation comes at each of them, also after the end.
NUM_TURNS = 12


async def one_command(client: Redis) -> None:
    await client.set("key", "value")


async def one_pipeline(client: Redis) -> None:
    async with client.pipeline(transaction=True) as pipeline:
        pipeline.set("key", "value")
        await pipeline.execute()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Redis]:
    client = valkey.connect(url)
    try:
        await client.set("key", "value")
        yield client
    finally:
        await client.aclose()


@pytest.mark.parametrize("use", [one_command, one_pipeline])
async def test_a_cancellation_is_heard_whenever_it_comes(
    valkey_url: str, use: Callable[[Redis], Awaitable[None]]
) -> None:
    async with connected(valkey_url) as client:
        for num_turns in range(NUM_TURNS):

            async def use_once() -> None:
                await use(client)

            task = asyncio.create_task(use_once())
            for _ in range(num_turns):
                await asyncio.sleep(0)
            is_too_late = task.done()
            task.cancel()
            await asyncio.wait({task}, timeout=10)

            assert task.cancelled() != is_too_late, f"after {num_turns} turns"


async def test_a_client_waits_for_as_many_engines_hints_at_once_as_a_large_fleet_has(valkey_url: str) -> None:
    async with connected(valkey_url) as client:

        async def wait_for_hint(number: int) -> object:
            return await client.xread({f"hints:{number}": "$"}, block=5_000)

        waits = [asyncio.create_task(wait_for_hint(number)) for number in range(300)]

        async def are_all_waiting() -> bool:
            return int((await client.info("clients"))["blocked_clients"]) >= len(waits)

        await eventually(are_all_waiting)
        for number in range(len(waits)):
            await client.xadd(f"hints:{number}", {"number": number})

        assert all(await asyncio.gather(*waits))


async def test_a_cancelled_task_can_still_clean_up_in_valkey(valkey_url: str) -> None:
    async with connected(valkey_url) as client:

        async def hold() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await client.delete("key")

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=10)

        assert task.cancelled()
        assert await client.get("key") is None
