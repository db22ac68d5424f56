"""Blobs are written to Valkey out of the memory that they lie in; what fails there is written as before, and named."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.blob_tier import Bulk, ValkeyTier
from loraplex_adapter_store.repository.bulk_reader import BulkReader
from loraplex_adapter_store.repository.bulk_writer import BulkWriter, Unwritten
from loraplex_common.errors import SaturatedError, StoreUnavailableError
from loraplex_common.valkey_client import blocking_pool, connect
from support.valkey import fresh_database, running_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from loraplex_adapter_store.repository.blob_tier import Chunk
    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
DIGEST = "ab" * 32
CHUNKS = [bytes([number]) * 2**20 for number in range(6)]


def views(chunk: bytes, length: int = 300_000) -> Chunk:
    return [memoryview(chunk)[start : start + length] for start in range(0, len(chunk), length)]


class Rig:
    def __init__(self, url: str) -> None:
        pool = blocking_pool(url)
        assert pool is not None
        self.writer = BulkWriter(pool)
        self.reader = BulkReader(pool)
        self.client: Any = redis.Redis.from_url(url)
        self.async_client = connect(url)
        self.tier = ValkeyTier(self.async_client, Bulk(self.reader, self.writer))

    def write(self, chunks: Iterator[Chunk], stop_before: int | None = None) -> Unwritten:
        left = Unwritten(chunks)
        self.writer.write(
            DIGEST, left, lambda: stop_before is not None and left.num_stored + left.num_sent >= stop_before
        )
        return left

    def stored(self) -> list[bytes]:
        """Return the chunks in Valkey up to the first that is missing."""
        found: list[bytes | None] = self.client.mget([keys.chunk(DIGEST, number) for number in range(len(CHUNKS) + 1)])
        return [chunk for chunk in found if chunk is not None]

    def end_connections(self) -> None:
        """Let Valkey close all connections but the test's own."""
        own = self.client.client_id()
        for each in self.client.client_list():
            if int(each["id"]) != own:
                self.client.client_kill_filter(_id=each["id"])


@asynccontextmanager
async def running_rig(url: str) -> AsyncIterator[Rig]:
    found = Rig(url)
    yield found
    await asyncio.to_thread(found.writer.close)
    await asyncio.to_thread(found.reader.close)
    await found.async_client.aclose()
    found.client.close()


@pytest.fixture
async def rig(store_valkey: EmbeddedValkey) -> AsyncIterator[Rig]:
    async with running_rig(fresh_database(store_valkey)) as found:
        yield found


async def test_all_chunks_are_stored_and_the_connection_serves_the_next_blob(rig: Rig) -> None:
    for _ in range(3):
        left = rig.write(map(views, CHUNKS))
        assert (left.num_stored, list(left)) == (len(CHUNKS), [])
    assert rig.stored() == CHUNKS
    assert len(rig.client.client_list()) == 2


@pytest.mark.parametrize("length", [1, 1500, 2**20])
async def test_a_chunk_may_consist_of_any_number_of_views(rig: Rig, length: int) -> None:
    chunk = bytes(range(256)) * 16
    rig.write(iter([views(chunk, length)]))
    assert rig.stored() == [chunk]


async def test_a_write_ends_before_the_chunk_that_it_is_told_to(rig: Rig) -> None:
    left = rig.write(map(views, CHUNKS), stop_before=2)
    assert rig.stored() == CHUNKS[:2]
    assert [b"".join(chunk) for chunk in left] == CHUNKS[2:]


async def test_what_a_closed_connection_leaves_unwritten_is_written_by_the_other_client(rig: Rig) -> None:
    def chunks() -> Iterator[Chunk]:
        for number, chunk in enumerate(CHUNKS):
            if number == 3:
                rig.end_connections()
            yield views(chunk)

    left = rig.write(chunks())
    assert left.num_stored < 4
    assert [b"".join(chunk) for chunk in left] == CHUNKS[left.num_stored :]

    rig.client.flushdb()
    await rig.tier.write(DIGEST, chunks())
    assert rig.stored() == CHUNKS


async def test_without_valkey_everything_is_left_and_the_tier_names_the_failure() -> None:
    pool = blocking_pool("unix:///nowhere/valkey.sock")
    assert pool is not None
    bulk, client = Bulk(BulkReader(pool), BulkWriter(pool)), connect("unix:///nowhere/valkey.sock")
    left = Unwritten(map(views, CHUNKS))
    bulk.writer.write(DIGEST, left, lambda: False)
    assert [b"".join(chunk) for chunk in left] == CHUNKS

    with pytest.raises(StoreUnavailableError, match="cannot reach its Valkey"):
        await ValkeyTier(client, bulk).write(DIGEST, map(views, CHUNKS))
    await client.aclose()
    bulk.close()


async def test_a_full_valkey_is_named_as_such(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        async with running_rig(server.url) as rig:
            rig.client.config_set("maxmemory", rig.client.info("memory")["used_memory"] + 4 * 2**20)
            with pytest.raises(SaturatedError, match="Valkey is full"):
                await rig.tier.write(DIGEST, map(views, CHUNKS))
            assert 0 < len(rig.stored()) < len(CHUNKS)


async def test_a_cancelled_write_has_ended_when_its_caller_goes_on(rig: Rig) -> None:
    is_reached, is_free = threading.Event(), threading.Event()

    def chunks() -> Iterator[Chunk]:
        for number, chunk in enumerate(CHUNKS):
            if number == 2:
                is_reached.set()
                is_free.wait()
            yield views(chunk)

    writing = asyncio.create_task(rig.tier.write(DIGEST, chunks()))
    await asyncio.to_thread(is_reached.wait)
    writing.cancel()
    await asyncio.sleep(0)
    assert not writing.done()

    is_free.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    num_stored = len(rig.stored())
    assert num_stored <= 3
    await asyncio.to_thread(rig.writer.executor.shutdown)
    assert len(rig.stored()) == num_stored


async def test_what_goes_wrong_while_chunks_are_made_is_raised(rig: Rig) -> None:
    def chunks() -> Iterator[Chunk]:
        yield views(CHUNKS[0])
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await rig.tier.write(DIGEST, chunks())
