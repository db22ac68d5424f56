"""Reads the engine registry in Valkey; what was last known stays while Valkey is away."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger
from loraplex_common.registry import ENGINES_KEY, EngineRecord, engine_key
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from loraplex_gateway.engine_pool import EnginePool

POLL_S: Final = 0.5
READ_TIMEOUT_S: Final = 5.0

_log = get_logger()


class RegistryWatcher:
    """Polls the registry and tells the pool.

    Args:
        valkey: Client.
        pool: Gets the truth of every successful poll.
    """

    def __init__(self, valkey: Redis, pool: EnginePool) -> None:
        self._valkey = valkey
        self._pool = pool
        self._is_down = False

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            await self.poll_once()
            await asyncio.sleep(POLL_S)

    async def poll_once(self) -> None:
        """Read the registry once; a failure leaves everything as it is."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                records = await self._read()
        except (RedisError, OSError, TimeoutError) as error:
            if not self._is_down:
                _log.warning("Valkey is away; engines stay as last known", cause=str(error))
            self._is_down = True
            return
        if self._is_down:
            _log.info("Valkey is back")
        self._is_down = False
        self._pool.sync(records)

    async def _read(self) -> dict[str, EngineRecord]:
        # Scores are lease expiries: an engine past its score is gone, even if nobody has removed it yet.
        ids = await self._valkey.zrangebyscore(ENGINES_KEY, time.time(), "+inf")
        if not ids:
            return {}
        values = await self._valkey.mget(
            [engine_key(engine_id.decode()) for engine_id in ids if isinstance(engine_id, bytes)]
        )
        records = [EngineRecord.from_json(value) for value in values if value is not None]
        return {record.engine_id: record for record in records}
