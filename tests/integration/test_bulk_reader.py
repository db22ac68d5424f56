"""Blobs are read from Valkey straight into memory, up to the first chunk that is not there or not right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import crc32c
import pytest
import redis
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.bulk_reader import BulkReader
from loraplex_common.valkey_client import blocking_pool
from support.valkey import fresh_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
DIGEST = "ab" * 32
CHUNK = 100_000
DATA = bytes(range(251)) * 2000  # six chunks, the last one shorter
CHUNKS = [DATA[start : start + CHUNK] for start in range(0, len(DATA), CHUNK)]
CHECKSUMS = [crc32c.crc32c(chunk) for chunk in CHUNKS]


class Rig:
    def __init__(self, url: str) -> None:
        pool = blocking_pool(url)
        assert pool is not None
        self.reader = BulkReader(pool)
        self.client = redis.Redis.from_url(url)
        for number, chunk in enumerate(CHUNKS):
            self.client.set(keys.chunk(DIGEST, number), chunk)

    def read(self, stop_at: int | None = None) -> tuple[list[int], bytes]:
        """Return the positions that were told, and the bytes up to the last."""
        out, positions = bytearray(len(DATA)), []

        def arrived(position: int) -> bool:
            positions.append(position)
            return position != stop_at

        self.reader.read(DIGEST, CHUNK, CHECKSUMS, memoryview(out), arrived)
        return positions, bytes(out[: positions[-1] if positions else 0])


@pytest.fixture
def rig(store_valkey: EmbeddedValkey) -> Iterator[Rig]:
    found = Rig(fresh_database(store_valkey))
    yield found
    found.client.close()
    found.reader.close()


ALL = [*range(CHUNK, len(DATA), CHUNK), len(DATA)]


def test_all_chunks_arrive_in_order_and_the_connection_serves_the_next_blob(rig: Rig) -> None:
    for _ in range(3):
        assert rig.read() == (ALL, DATA)
    assert len(rig.client.client_list()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(CHUNKS[3][:-1], id="cut"),
        pytest.param(CHUNKS[3] + b"x", id="longer"),
        pytest.param(bytes([CHUNKS[3][0] ^ 1]) + CHUNKS[3][1:], id="a flipped bit"),
    ],
)
def test_a_read_ends_before_a_chunk_that_is_not_right(rig: Rig, damage: bytes | None) -> None:
    name = keys.chunk(DIGEST, 3)
    if damage is None:
        rig.client.delete(name)
    else:
        rig.client.set(name, damage)
    assert rig.read() == (ALL[:3], DATA[: 3 * CHUNK])
    rig.client.set(name, CHUNKS[3])
    assert rig.read() == (ALL, DATA)


def test_an_answer_that_is_an_error_ends_the_read(rig: Rig) -> None:
    rig.client.delete(keys.chunk(DIGEST, 0))
    rig.client.rpush(keys.chunk(DIGEST, 0), "of another type")
    assert rig.read() == ([], b"")


def test_a_read_ends_where_it_is_told_to(rig: Rig) -> None:
    assert rig.read(stop_at=2 * CHUNK) == (ALL[:2], DATA[: 2 * CHUNK])
    assert rig.read() == (ALL, DATA)


def test_a_connection_that_valkey_has_closed_is_made_anew(rig: Rig) -> None:
    assert rig.read() == (ALL, DATA)
    own = rig.client.client_id()
    for each in rig.client.client_list():
        if int(each["id"]) != own:
            rig.client.client_kill_filter(_id=each["id"])
    assert rig.read() == (ALL, DATA)


def test_without_valkey_nothing_arrives_and_nothing_is_raised() -> None:
    pool = blocking_pool("unix:///nowhere/valkey.sock")
    assert pool is not None
    reader = BulkReader(pool)
    told: list[int] = []

    def arrived(position: int) -> bool:
        told.append(position)
        return True

    reader.read(DIGEST, CHUNK, CHECKSUMS, memoryview(bytearray(len(DATA))), arrived)
    reader.close()
    assert told == []


@pytest.mark.parametrize("url", ["rediss://127.0.0.1:1", "redis-sentinel://127.0.0.1:1#primary"])
def test_tls_and_sentinels_have_no_blocking_connections(url: str) -> None:
    assert blocking_pool(url) is None
