"""What all replicas know of sources that requests name: pins, revisions, refusals, and the adapters made of them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from google.rpc import status_pb2
from loraplex_common.error_status import from_status, to_status
from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

LEASE_MS: Final = 10_000
"""How long the import of a replica that died keeps others from the same import."""
POLL_S: Final = 0.1
MAX_REFUSALS: Final = 4096
PINNED_TTL_S: Final = 7 * 24 * 3600
"""How long the revision of a pinned source is remembered; the revision itself goes with its last name."""

MAX_TTL_S: Final = 10 * 365 * 24 * 3600

_log = get_logger()

REMEMBER: Final = """
-- Remembers a refusal, forgets those that have expired, and the oldest beyond the most that are kept.
-- KEYS: refused, until.  ARGV: source, status, until (ms), now (ms), most
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
local gone = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[4], 'LIMIT', 0, 100)
local more = redis.call('ZCARD', KEYS[2]) - #gone - tonumber(ARGV[5])
if more > 0 then gone = redis.call('ZRANGE', KEYS[2], 0, #gone + more - 1) end
for _, source in ipairs(gone) do
  redis.call('HDEL', KEYS[1], source)
  redis.call('ZREM', KEYS[2], source)
end
return 1
"""

NOTE: Final = """
-- Notes a name, its bytes and its use.  KEYS: uses, info, bytes.  ARGV: name, now (ms), info (JSON)
local before = redis.call('HGET', KEYS[2], ARGV[1])
local size = cjson.decode(ARGV[3]).num_bytes - (before and cjson.decode(before).num_bytes or 0)
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
if size ~= 0 then redis.call('INCRBY', KEYS[3], string.format('%d', size)) end
return 1
"""

FORGET: Final = (
    ALLOWED_WHEN_FULL
    + """
-- Forgets a name.  KEYS: uses, info, bytes.  ARGV: name
local before = redis.call('HGET', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
if not before then return 0 end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('DECRBY', KEYS[3], string.format('%d', cjson.decode(before).num_bytes))
return 1
"""
)

RENEW: Final = """
-- KEYS: lease.  ARGV: its holder, ms
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

RELEASE: Final = (
    ALLOWED_WHEN_FULL
    + """
-- KEYS: lease.  ARGV: its holder
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedInfo:
    """An adapter that was resolved at request time.

    Attributes:
        tenant: The tenant that it is for.
        source: Its pinned source.
        num_bytes: Bytes of its canonical form.
    """

    tenant: str
    source: str
    num_bytes: int


class ResolvedRecords:
    """The records, in Valkey.

    Args:
        client: Valkey.
    """

    def __init__(self, client: keys.Client) -> None:
        self._client = client

    async def pin(self, source: str) -> str | None:
        """Return what a source was pinned to last; None if that is unknown or too long ago."""
        with keys.translated():
            found = await self._client.get(keys.resolve_pin(source))
        return found.decode() if found else None

    async def set_pin(self, source: str, pinned: str, ttl_s: float) -> None:
        """Remember what a source was pinned to."""
        with keys.translated():
            await self._client.set(keys.resolve_pin(source), pinned, px=_milliseconds(ttl_s))

    async def digest(self, source: str) -> str | None:
        """Return the revision that a pinned source is, as far as it is remembered; it may be gone."""
        with keys.translated():
            found = await self._client.get(keys.resolve_digest(source))
        return found.decode() if found else None

    async def set_digest(self, source: str, digest: str, ttl_s: float = PINNED_TTL_S) -> None:
        """Remember a pinned source's revision."""
        with keys.translated():
            await self._client.set(keys.resolve_digest(source), digest, px=_milliseconds(ttl_s))

    async def refusal(self, source: str) -> LoraplexError | None:
        """Return why a source could not be resolved a moment ago; None if nothing is remembered."""
        with keys.translated():
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.hget(keys.REFUSED, source)
                pipeline.zscore(keys.REFUSED_UNTIL, source)
                status, until_ms = await pipeline.execute()
        if status is None or until_ms is None or until_ms <= time.time() * 1000:
            return None
        return from_status(status_pb2.Status.FromString(status))

    async def refuse(self, source: str, error: LoraplexError, ttl_s: float) -> None:
        """Remember why a source could not be resolved."""
        now_ms = time.time() * 1000
        words = (source, to_status(error).SerializeToString(), now_ms + ttl_s * 1000, now_ms, MAX_REFUSALS)
        with keys.translated():
            await self._client.eval(REMEMBER, 2, keys.REFUSED, keys.REFUSED_UNTIL, *words)

    async def note(self, name: str, info: ResolvedInfo) -> None:
        """Note a name that was resolved just now."""
        words = (name, round(time.time() * 1000), json.dumps(asdict(info)))
        with keys.translated():
            await self._client.eval(NOTE, 3, keys.RESOLVED_USES, keys.RESOLVED_INFO, keys.RESOLVED_BYTES, *words)

    async def touch(self, name: str) -> bool:
        """Note the use of a name; return whether it is one that was resolved."""
        with keys.translated():
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.zadd(keys.RESOLVED_USES, {name: round(time.time() * 1000)}, xx=True)
                pipeline.zscore(keys.RESOLVED_USES, name)
                _, score = await pipeline.execute()
        return score is not None

    async def forget(self, name: str) -> None:
        """Forget a name."""
        with keys.translated():
            await self._client.eval(FORGET, 3, keys.RESOLVED_USES, keys.RESOLVED_INFO, keys.RESOLVED_BYTES, name)

    async def info(self, names: Sequence[str]) -> dict[str, ResolvedInfo]:
        """Return what is known of some names."""
        if not names:
            return {}
        with keys.translated():
            found = await self._client.hmget(keys.RESOLVED_INFO, list(names))
        return {name: ResolvedInfo(**json.loads(data)) for name, data in zip(names, found, strict=True) if data}

    async def unused(self, *, start: int = 0, count: int = 100, before_ms: float = float("inf")) -> list[str]:
        """Return names by their last use, the oldest first, as far as that was before a time."""
        with keys.translated():
            found = await self._client.zrangebyscore(keys.RESOLVED_USES, "-inf", before_ms, start=start, num=count)
        return [name.decode() for name in found]

    async def by_use(self, names: Collection[str]) -> list[str]:
        """Return those of some names that were resolved, least recently used first."""
        if not names:
            return []
        ordered = list(names)
        with keys.translated():
            found = await self._client.zmscore(keys.RESOLVED_USES, ordered)
        used = {name: score for name, score in zip(ordered, found, strict=True) if score is not None}
        return sorted(used, key=lambda name: float(used[name]))

    async def num_bytes(self) -> int:
        """Return the canonical bytes of all resolved adapters; equal ones under several names count each time."""
        with keys.translated():
            return int(await self._client.get(keys.RESOLVED_BYTES) or 0)

    @asynccontextmanager
    async def lease(self, source: str) -> AsyncIterator[None]:
        """Be the only one, of all replicas, that fetches a source; wait until no other does.

        Where Valkey is away for longer than `LEASE_MS` there may be two: they write the same.
        """
        key, holder = keys.resolve_lease(source), uuid.uuid4().hex
        while True:
            with keys.translated():
                if await self._client.set(key, holder, nx=True, px=LEASE_MS):
                    break
            await asyncio.sleep(POLL_S)
        renewing = asyncio.create_task(self._renew(key, holder), name=f"renew {key}")
        try:
            yield
        finally:
            await cancel_and_wait(renewing)
            await asyncio.shield(self._release(key, holder))

    async def _renew(self, key: str, holder: str) -> None:
        while True:
            await asyncio.sleep(LEASE_MS / 3000)
            try:
                with keys.translated():
                    await self._client.eval(RENEW, 1, key, holder, LEASE_MS)
            except LoraplexError as error:
                _log.warning("the lease of an import cannot be renewed", error=error.message)

    async def _release(self, key: str, holder: str) -> None:
        try:
            with keys.translated():
                await self._client.eval(RELEASE, 1, key, holder)
        except LoraplexError:
            return  # it expires


def _milliseconds(ttl_s: float) -> int:
    return max(1, round(min(ttl_s, MAX_TTL_S) * 1000))
