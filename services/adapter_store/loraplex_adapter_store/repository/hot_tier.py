"""Copies of canonical blobs in Valkey, before a tier that has all of them: under a byte budget, the longest unused go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger
from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.blob_tier import ChunkPlace, ValkeyTier

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_adapter_store.repository.blob_tier import Chunk

_log = get_logger()

_DROP: Final = """
local function drop(digest)
  local chunks = redis.call('HGETALL', KEYS_OF_BLOB .. digest)
  for i = 1, #chunks, 2 do
    redis.call('UNLINK', 'a:{' .. digest .. '}:c:' .. chunks[i])
    redis.call('DECRBY', TOTAL, chunks[i + 1])
  end
  redis.call('DEL', KEYS_OF_BLOB .. digest)
  redis.call('ZREM', ORDER, digest)
end
"""

_KEEP: Final = (
    "local ORDER, TOTAL, KEYS_OF_BLOB = KEYS[1], KEYS[2], ARGV[1]"
    + _DROP
    + """
-- Stores a copy of a chunk and counts it, then drops the blobs that were used longest ago until the budget holds. One
-- step, so that no copy is ever uncounted; the keys of what is dropped are known here alone.
-- KEYS: order, total, the chunk.  ARGV: prefix of the blobs' hashes, digest, number, chunk, now (ms), budget
local blob = KEYS_OF_BLOB .. ARGV[2]
local before = tonumber(redis.call('HGET', blob, ARGV[3]) or '0')
redis.call('SET', KEYS[3], ARGV[4])
redis.call('HSET', blob, ARGV[3], #ARGV[4])
redis.call('ZADD', ORDER, ARGV[5], ARGV[2])
local total, dropped = redis.call('INCRBY', TOTAL, #ARGV[4] - before), 0
while total > tonumber(ARGV[6]) do
  local oldest = redis.call('ZRANGE', ORDER, 0, 0)[1]
  if not oldest then break end
  drop(oldest)
  total, dropped = tonumber(redis.call('GET', TOTAL)), dropped + 1
end
return dropped
"""
)

_FORGET: Final = (
    ALLOWED_WHEN_FULL
    + "local ORDER, TOTAL, KEYS_OF_BLOB = KEYS[1], KEYS[2], ARGV[1]"
    + _DROP
    + """
-- Drops the copies of a blob.  KEYS: order, total.  ARGV: prefix of the blobs' hashes, digest
drop(ARGV[2])
return 1
"""
)


class ColdTierError(ValueError):
    """Valkey's adapters lie elsewhere than this store is told."""


class HotTier:
    """A `BlobTier` of copies in Valkey.

    Args:
        client: Valkey.
        budget_bytes: Most bytes of all copies.
    """

    name: str = "redis"

    def __init__(self, client: keys.Client, *, budget_bytes: int) -> None:
        self._client = client
        self._budget_bytes = budget_bytes
        self._plain = ValkeyTier(client)

    async def write(self, digest: str, chunks: Iterable[Chunk]) -> None:
        """See `BlobTier`."""
        start = 0
        for number, chunk in enumerate(map(b"".join, chunks)):
            await self.keep(digest, ChunkPlace(number, start, start + len(chunk)), chunk)
            start += len(chunk)

    async def keep(self, digest: str, place: ChunkPlace, chunk: bytes) -> None:
        """See `BlobTier`."""
        names = [keys.HOT, keys.HOT_BYTES, keys.chunk(digest, place.number)]
        values = [keys.hot_chunks(""), digest, place.number, chunk, _now_ms(), self._budget_bytes]
        with keys.translated():
            dropped = await self._client.eval(_KEEP, len(names), *names, *values)
        if dropped:
            _log.debug("copies dropped for others", num_blobs=dropped)

    async def read(self, digest: str, place: ChunkPlace) -> bytes | None:
        """See `BlobTier`."""
        chunk = await self._plain.read(digest, place)
        if chunk is not None and place.number == 0:
            with keys.translated():
                await self._client.zadd(keys.HOT, {digest: _now_ms()}, xx=True)
        return chunk

    async def holds(self, digest: str, num_chunks: int) -> bool:
        """See `BlobTier`."""
        return await self._plain.holds(digest, num_chunks)

    async def delete(self, digest: str, num_chunks: int) -> None:
        """See `BlobTier`."""
        with keys.translated():
            await self._client.eval(_FORGET, 2, keys.HOT, keys.HOT_BYTES, keys.hot_chunks(""), digest)
        await self._plain.delete(digest, num_chunks)  # of a store before it had a cold tier


async def settle_place(client: keys.Client, place: str) -> None:
    """Write down where all blobs lie, or find that they lie elsewhere.

    Args:
        client: Valkey.
        place: The cold tier's folder; empty for Valkey itself.

    Raises:
        ColdTierError: If another folder is written down.
        StoreUnavailableError: If Valkey cannot be reached.
    """
    with keys.translated():
        known = await client.get(keys.COLD_TIER)
        if known is None and place:
            known = await client.set(keys.COLD_TIER, place, nx=True, get=True)
    if known is not None and known.decode() != place:
        found = known.decode()
        raise ColdTierError(
            f"the adapters of this Valkey lie in {found}, not in {place or 'Valkey alone'}: start with --cold-tier {found}, or, "
            f"once all of its objects are there too, delete the key {keys.COLD_TIER}"
        )


def _now_ms() -> int:
    return round(time.time() * 1000)
