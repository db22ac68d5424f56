"""The engine's lease in Valkey: gateways find the engine by it, and notice by it that the engine is gone."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.registry import (
    ENGINE_LEASE_S,
    ENGINE_RECORD_S,
    ENGINE_RENEW_S,
    ENGINES_KEY,
    EngineRecord,
    engine_key,
)
from loraplex_common.tasks import deliver_cancellation
from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import redis.asyncio
    from loraplex_common.base_model import BaseModelInfo

    from loraplex_engine.config import EngineConfig
    from loraplex_engine.limits import EngineLimits

_log = get_logger()

_RENEW = (
    ALLOWED_WHEN_FULL
    + """
-- KEYS: record, engines.  ARGV: record, how long it is kept (ms), engine id, end of the lease, oldest end worth keeping
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. ARGV[5])
return 1
"""
)


class Registration:
    """Keeps one engine's record alive for as long as `run` runs.

    Valkey may fail and come back: meanwhile gateways use what they last read, and one renewal after Valkey is back the
    record is there again. A Valkey that is full still takes renewals: a record is small, and each engine has one.

    Args:
        client: Connection; the caller closes it.
        record: What gateways are to know.
        renew_s: Seconds between two renewals.
    """

    def __init__(self, client: redis.asyncio.Redis, record: EngineRecord, *, renew_s: float = ENGINE_RENEW_S) -> None:
        self._client = client
        self._record = record
        self._renew_s = renew_s
        self._is_reachable = True
        self._lock = asyncio.Lock()  # a renewal under way must not write again what `withdraw` deletes
        self._is_withdrawn = False

    @property
    def record(self) -> EngineRecord:
        """The record that gateways read."""
        return self._record

    async def run(self) -> None:
        """Renew the lease until cancelled."""
        while True:
            await self.renew()
            deliver_cancellation()
            await asyncio.sleep(self._renew_s)

    async def renew(self) -> bool:
        """Write the record with a fresh lease; return whether Valkey took it."""
        async with self._lock:
            if self._is_withdrawn:
                return False
            return await self._attempt(self._write)

    async def announce(self, *, is_draining: bool) -> None:
        """Tell gateways whether to send new requests."""
        if is_draining == self._record.is_draining:
            return
        self._record = dataclasses.replace(self._record, is_draining=is_draining)
        await self.renew()

    async def withdraw(self) -> None:
        """Delete the record for good."""
        async with self._lock:
            self._is_withdrawn = True
            await self._attempt(self._delete)

    async def _write(self) -> None:
        engine_id, now = self._record.engine_id, time.time()
        values: list[str | float] = [self._record.to_json(), round(ENGINE_RECORD_S * 1000), engine_id]
        values += [now + ENGINE_LEASE_S, now - ENGINE_RECORD_S]
        await self._client.eval(_RENEW, 2, engine_key(engine_id), ENGINES_KEY, *values)

    async def _delete(self) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.delete(engine_key(self._record.engine_id))
            pipeline.zrem(ENGINES_KEY, self._record.engine_id)
            await pipeline.execute()

    async def _attempt(self, operation: Callable[[], Awaitable[None]]) -> bool:
        try:
            await operation()
        except LoraplexError as error:
            if self._is_reachable:
                _log.warning("the lease cannot be renewed; gateways go on with what they know", error=error.message)
            self._is_reachable = False
            return False
        if not self._is_reachable:
            _log.info("Valkey is back", engine_id=self._record.engine_id)
        self._is_reachable = True
        return True


def advertised(config: EngineConfig, port: int) -> str:
    """Return the address at which gateways reach an engine whose gRPC port is bound."""
    address = config.advertise or config.host
    has_port = address.rpartition(":")[2].isdigit() and not address.endswith("]")
    return address if has_port else f"{address}:{port}"


def engine_record(engine_id: str, target: str, info: BaseModelInfo, limits: EngineLimits) -> EngineRecord:
    """Return what an engine registers."""
    return EngineRecord(
        engine_id=engine_id,
        target=target,
        base_model=info.name,
        base_fingerprint=info.fingerprint,
        base_aliases=info.aliases,
        max_model_len=limits.max_model_len,
        vocab_size=info.vocab_size,
        num_pages=limits.num_pages,
        block_tokens=limits.block_tokens,
        page_bytes=limits.page_bytes,
        max_image_pages=limits.max_image_pages,
        constrains=True,
        sums_adapters=True,
        numerics=limits.numerics,
    )
