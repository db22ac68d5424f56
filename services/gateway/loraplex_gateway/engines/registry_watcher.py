"""Reads the engine registry in Valkey; what was last known stays while Valkey is away or takes no writes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.housekeeping import Trouble
from loraplex_common.registry import ENGINE_LEASE_S, EngineRecord, RegistryReader
from loraplex_common.tasks import deliver_cancellation

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from loraplex_gateway.engines.pool import EnginePool

POLL_S: Final = 0.5
READ_TIMEOUT_S: Final = 5.0


class RegistryWatcher:
    """Polls the registry and tells the pool.

    Args:
        valkey: Client.
        pool: Gets the truth of every successful poll.
    """

    def __init__(self, valkey: Redis, pool: EnginePool) -> None:
        self._reader = RegistryReader(valkey)
        self._pool = pool
        self._away, self._frozen = Trouble(), Trouble()
        self._is_trusted = True
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
                view = await self._reader.view()
        except (LoraplexError, TimeoutError) as error:
            self._away.warn("Valkey is away; engines stay as last known", cause=str(error))
            self._is_trusted = False
            return
        self._away.over("Valkey is back")
        if not view.takes_writes:
            self._frozen.warn("Valkey takes no writes; engines whose lease runs out are asked themselves")
            self._is_trusted = False
            self._records = {**self._records, **view.leased}
            self._pool.sync(view.leased, view.lapsed)
            return
        self._frozen.over("Valkey takes writes again")
        self._believe(view.leased)

    def _believe(self, leased: dict[str, EngineRecord]) -> None:
        now = asyncio.get_running_loop().time()
        if not self._is_trusted:
            # Leases ran out meanwhile and engines need a moment to renew them: no engine is taken for gone before that.
            self._trusted_from = now + ENGINE_LEASE_S
        self._is_trusted = True
        self._records = {**self._records, **leased} if now < self._trusted_from else leased
        self._pool.sync(self._records)
