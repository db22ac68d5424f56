"""Watches the page pools of all engines while there is a reader, once for all readers."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_gateway.fleet.engine_watch import EngineWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc
    from loraplex_common.adapter_names import AdapterNames

    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.fleet.news import News

MAX_BACKLOG: Final = 256
"""News that a reader may be behind; one that is further behind gets everything anew instead."""

_log = get_logger()


class FleetWatch:
    """Tells readers of the engines' page pools.

    Args:
        pool: Knows which engines there are.
        names: The adapters' names.
        dial: Opens a channel to an engine's address.
    """

    def __init__(self, pool: EnginePool, names: AdapterNames, dial: Callable[[str], grpc.aio.Channel]) -> None:
        self._pool, self._names, self._dial = pool, names, dial
        self._engines: dict[str, EngineWatch] = {}
        self._readers: set[FleetReader] = set()
        self._following: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def num_watched(self) -> int:
        """Engines that are watched now; 0 while there is no reader."""
        return len(self._engines)

    @contextmanager
    def reading(self) -> Iterator[FleetReader]:
        """Let a reader follow the fleet during the block."""
        reader = FleetReader(self._snapshots)
        self._readers.add(reader)
        if self._is_closed:
            reader.close()
        elif self._following is None:
            self._following = asyncio.create_task(self._follow(), name="fleet-watch")
            self._following.add_done_callback(self._ended)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            if not self._readers:
                self._stop()

    def end_readers(self) -> None:
        """End all readers, and later ones at once: the gateway goes out of service."""
        self._is_closed = True
        for reader in self._readers:
            reader.close()

    async def close(self) -> None:
        """Stop watching and wait until everything is gone."""
        self.end_readers()
        self._stop()
        await cancel_and_wait(*self._ending)

    def _stop(self) -> None:
        tasks = [self._following] if self._following is not None else []
        tasks += [engine.task for engine in self._engines.values()]
        self._following = None
        self._engines.clear()
        for task in tasks:
            self._end(task)

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _follow(self) -> None:
        """Watch the engines that there are, and no others."""
        while True:
            changed = self._pool.changed
            links = {link.engine_id: link for link in self._pool.links}
            for engine_id in self._engines.keys() - links.keys():
                gone = self._engines.pop(engine_id)
                self._end(gone.task)
                self._tell(gone.farewell())
            for engine_id in links.keys() - self._engines.keys():
                record = links[engine_id].record
                self._engines[engine_id] = watch = EngineWatch(
                    record, self._names, dial=self._dial, tell=self._tell, passed_over=self._pool.passed_over
                )
                watch.task.add_done_callback(self._ended)
            await changed.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the readers if a fault of ours has ended a task: it is logged, and they come again to a new watch."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the watch of the fleet failed", task=task.get_name(), exc_info=error)
            for reader in self._readers:
                reader.close()

    def _tell(self, news: News) -> None:
        for reader in self._readers:
            reader.put(news)

    def _snapshots(self) -> list[News]:
        known = (engine for _, engine in sorted(self._engines.items()) if engine.is_known)
        return [engine.snapshot() for engine in known]


class FleetReader:
    """One reader's place: everything first, then news, and everything anew if it falls behind.

    Args:
        snapshots: Returns all that is known now.
    """

    def __init__(self, snapshots: Callable[[], list[News]]) -> None:
        self._snapshots = snapshots
        self._news: deque[News] = deque()
        self._is_behind = True
        self._is_closed = False
        self._has_news = asyncio.Event()
        self._has_news.set()

    def put(self, news: News) -> None:
        """Add news, unless everything is going to be told anyway."""
        if self._is_behind:
            return
        self._news.append(news)
        if len(self._news) > MAX_BACKLOG:
            self._news.clear()
            self._is_behind = True
        self._has_news.set()

    def close(self) -> None:
        """End the reader once it has taken what is there."""
        self._is_closed = True
        self._has_news.set()

    async def take(self, timeout_s: float) -> list[News] | None:
        """Return the news so far, as soon as there are any; empty after so many seconds without; None at the end."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._has_news.wait()
        except TimeoutError:
            return []
        if self._is_closed:
            return None
        self._has_news.clear()
        if self._is_behind:
            self._is_behind = False
            return self._snapshots()
        news = list(self._news)
        self._news.clear()
        return news
