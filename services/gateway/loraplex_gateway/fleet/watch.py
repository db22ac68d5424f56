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
    from collections.abc import Awaitable, Callable, Iterator

    import grpc
    from loraplex_common.adapter_names import AdapterNames

    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.fleet.news import News

MAX_BACKLOG: Final = 256
"""News that a reader may be behind; one that is further behind gets everything anew instead, engine by engine."""

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
        reader = FleetReader(self._known, self._snapshot)
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

    def _known(self) -> list[str]:
        return sorted(engine_id for engine_id, engine in self._engines.items() if engine.is_known)

    async def _snapshot(self, engine_id: str) -> News | None:
        engine = self._engines.get(engine_id)
        return await engine.snapshot() if engine is not None and engine.is_known else None


class FleetReader:
    """One reader's place: everything first, then news, and everything anew if it falls behind.

    Everything is told one engine at a time, since the pools of a whole fleet at once would hold up every other stream.

    Args:
        known: Returns the ids of the engines of which anything is known.
        snapshot: Returns all that is known of an engine; None if it is gone.
    """

    def __init__(self, known: Callable[[], list[str]], snapshot: Callable[[str], Awaitable[News | None]]) -> None:
        self._known, self._snapshot = known, snapshot
        self._news: deque[News] = deque()
        self._owed: dict[str, None] = {}  # a set in order: engines to be told of anew
        self._is_behind = True
        self._is_closed = False
        self._has_news = asyncio.Event()
        self._has_news.set()

    def put(self, news: News) -> None:
        """Add news, unless all of its engine is going to be told anyway."""
        if news.message.gone:
            self._owed.pop(news.message.engine_id, None)  # what came before is told as far as it was
        elif self._is_behind or news.message.engine_id in self._owed:
            return
        self._news.append(news)
        if len(self._news) > MAX_BACKLOG and not self._is_behind:
            self._news = deque(each for each in self._news if each.message.gone)
            self._owed.clear()
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
        news, self._news = list(self._news), deque()
        if self._is_behind:
            self._is_behind = False
            self._owed = dict.fromkeys(self._known())
        if self._owed:
            news += await self._next_owed()
        if self._owed or self._is_behind:
            self._has_news.set()
        return news

    async def _next_owed(self) -> list[News]:
        """Return everything of the next engine, once others had their turn on the event loop."""
        await asyncio.sleep(0)
        if not self._owed:  # the last has gone meanwhile
            return []
        engine_id = next(iter(self._owed))
        del self._owed[engine_id]
        found = await self._snapshot(engine_id)
        return [] if found is None else [found]
