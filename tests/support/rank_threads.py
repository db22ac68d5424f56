"""A thread for each rank of a group in one process, over gloo."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from loraplex_engine.ranks.gloo import GlooGroup
from torch._C._distributed_c10d import HashStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.rank_group import RankGroup

TIMEOUT: Final = timedelta(seconds=60)
MadeT = TypeVar("MadeT")


class RankThread:
    """A rank's thread, which does what it is told in order."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((work, future))
        return future

    def end(self) -> None:
        self._work.put(None)
        self.thread.join(TIMEOUT.total_seconds())

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


def make_on_ranks(degree: int, make: Callable[[RankGroup], MadeT]) -> list[MadeT]:
    """Return what ``make`` makes on each rank of a new group, rank 0 first."""
    store = HashStore()
    with ThreadPoolExecutor(degree) as makers:
        return list(makers.map(lambda rank: make(GlooGroup(store, rank, degree, timeout=TIMEOUT)), range(degree)))
