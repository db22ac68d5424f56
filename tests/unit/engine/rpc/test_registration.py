from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_common.registry import (
    ENGINE_LEASE_S,
    ENGINE_RECORD_S,
    ENGINES_KEY,
    EngineRecord,
    RegistryReader,
    engine_key,
)
from loraplex_common.valkey import EmbeddedValkey, connect
from loraplex_engine.rpc.registration import Registration
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import redis.asyncio

RECORD = EngineRecord(
    engine_id="e1",
    target="127.0.0.1:1",
    base_model="base",
    base_fingerprint="f" * 64,
    max_model_len=512,
    vocab_size=100,
    num_pages=10,
    block_tokens=16,
    page_bytes=4096,
    max_image_pages=9,
)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path) as server:
        yield server


@pytest.fixture
async def client(valkey: EmbeddedValkey) -> AsyncIterator[redis.asyncio.Redis]:
    client = connect(valkey.url)
    yield client
    await client.aclose()


async def read(client: redis.asyncio.Redis) -> EngineRecord | None:
    data = await client.get(engine_key("e1"))
    return EngineRecord.from_json(data) if data else None


async def test_the_record_outlives_the_lease_for_gateways_that_start_while_no_lease_can_be_renewed(
    client: redis.asyncio.Redis,
) -> None:
    assert await Registration(client, RECORD).renew()

    assert await read(client) == RECORD
    assert ENGINE_LEASE_S * 1000 < await client.pttl(engine_key("e1")) <= ENGINE_RECORD_S * 1000
    score = await client.zscore(ENGINES_KEY, "e1")
    assert score == pytest.approx(time.time() + ENGINE_LEASE_S, abs=2)


async def test_running_renews_the_lease(client: redis.asyncio.Redis) -> None:
    task = asyncio.create_task(Registration(client, RECORD, renew_s=0.01).run())
    first = await eventually(lambda: client.zscore(ENGINES_KEY, "e1"))

    async def is_renewed() -> bool:
        return bool(await client.zscore(ENGINES_KEY, "e1") > first)

    await eventually(is_renewed)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_draining_is_announced_at_once_and_withdrawing_removes_the_record(client: redis.asyncio.Redis) -> None:
    registration = Registration(client, RECORD)
    await registration.renew()

    await registration.announce(is_draining=True)
    draining = await read(client)
    await registration.withdraw()
    was_renewed = await registration.renew()

    assert draining is not None
    assert draining.is_draining
    assert not was_renewed
    assert await read(client) is None
    assert await client.zscore(ENGINES_KEY, "e1") is None


async def test_the_record_comes_back_after_valkey_was_away(valkey: EmbeddedValkey, client: redis.asyncio.Redis) -> None:
    registration = Registration(client, RECORD)
    await registration.renew()

    valkey.kill()
    was_written_while_away = await registration.renew()
    valkey.start()
    await client.delete(engine_key("e1"))
    was_written_after = await registration.renew()

    assert (was_written_while_away, was_written_after) == (False, True)
    assert await read(client) == RECORD


async def test_a_lease_is_renewed_and_withdrawn_while_valkey_is_full(client: redis.asyncio.Redis) -> None:
    await client.config_set("maxmemory", 1)
    registration = Registration(client, RECORD)

    assert await registration.renew()
    assert await RegistryReader(client).read() == {"e1": RECORD}

    await registration.withdraw()
    assert await RegistryReader(client).read() == {}


async def test_engines_that_died_long_ago_leave_the_registry(client: redis.asyncio.Redis) -> None:
    await client.zadd(ENGINES_KEY, {"old": time.time() - ENGINE_RECORD_S - 1, "late": time.time() - 1})

    await Registration(client, RECORD).renew()

    assert await client.zrange(ENGINES_KEY, 0, -1) == [b"late", b"e1"]
