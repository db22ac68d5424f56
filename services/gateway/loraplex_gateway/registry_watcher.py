"""Reads the engine registry in Valkey; what was last known stays while Valkey is away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger
from loraplex_common.registry import ENGINE_LEASE_S, EngineRecord, RegistryReader
from loraplex_common.tasks import deliver_cancellation
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
        self._reader = RegistryReader(valkey)
        self._pool = pool
        self._is_down = False
        self._records: dict[str, EngineRecord] = {}
        self._trusted_from = 0.0

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            await self.poll_once()
            deliver_cancellation()
            await asyncio.sleep(POLL_S)

    async def poll_once(self) -> None:
        """Read the registry once; a failure leaves everything as it is."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                records = await self._reader.read()
        except (RedisError, OSError, TimeoutError) as error:
            if not self._is_down:
                _log.warning("Valkey is away; engines stay as last known", cause=str(error))
            self._is_down = True
            return
        now = asyncio.get_running_loop().time()
        if self._is_down:
            _log.info("Valkey is back")
            # Leases ran out meanwhile and engines need a moment to renew them: nobody is taken for gone before that.
            self._trusted_from = now + ENGINE_LEASE_S
        self._is_down = False
        self._records = {**self._records, **records} if now < self._trusted_from else records
        self._pool.sync(self._records)
