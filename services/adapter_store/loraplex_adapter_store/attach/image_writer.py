"""Writes images into the arenas of one engine: into shared memory where it can be reached, else over the stream."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from loraplex_adapter_store.attach.arena import SharedArena, SlotSink
from loraplex_adapter_store.attach.messages import Chunk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from concurrent.futures import Executor

    import numpy as np
    from numpy.typing import NDArray

    from loraplex_adapter_store.attach.messages import Hello
    from loraplex_adapter_store.attach.outbox import Outbox
    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.page_image import Image

MAX_CHUNK_BYTES: Final = 1024 * 1024
COPY_THREADS: Final = 4
"""Threads that copy one stretch into shared memory."""
STRETCH_BYTES: Final = 16 * 1024 * 1024
"""Bytes written to shared memory before more urgent transfers get their turn."""


class ImageWriter:
    """Writes images, one stretch of pages after another.

    Args:
        hello: The engine's arenas and the size of their pages.
        outbox: Takes the chunks for arenas that cannot be reached from here.
        executor: Runs the copies into shared memory.
        metrics: Counts the bytes.
    """

    def __init__(self, hello: Hello, outbox: Outbox, executor: Executor, metrics: StoreMetrics) -> None:
        self._page_bytes = hello.geometry.page_bytes
        self._outbox = outbox
        self._executor = executor
        self._metrics = metrics
        self._tells_written = hello.takes_written and hello.takes_tree_digests
        self._arenas = [SharedArena.open(info, self._page_bytes) for info in hello.arenas]

    @property
    def shared_memory(self) -> list[bool]:
        """Per rank, whether pages are written straight into the arena."""
        return [arena is not None for arena in self._arenas]

    @asynccontextmanager
    async def sink(self, digest: str, rank: int, slots: tuple[int, ...]) -> AsyncIterator[SlotSink | None]:
        """Give out what writes finished pages into a rank's slots; None if its arena cannot be reached from here.

        After the block, also if it is cancelled, nothing is written.
        """
        arena = self._arenas[rank]
        if arena is None:
            yield None
            return
        sink = SlotSink(arena, slots, self._teller(digest, rank))
        try:
            yield sink
        finally:
            await _uninterrupted(asyncio.ensure_future(asyncio.to_thread(sink.close)))

    def note_written(self, num_bytes: int) -> None:
        """Count what a sink has written."""
        self._metrics.push_bytes.labels("shared_memory").inc(num_bytes)

    async def write(
        self, digest: str, rank: int, image: Image, slots: tuple[int, ...], let_pass: Callable[[], Awaitable[None]]
    ) -> None:
        """Write one image.

        Args:
            digest: The revision, for chunks.
            rank: The engine's rank, which has an arena of its own.
            image: Pages, ``[num_pages, page_bytes]``.
            slots: Arena slot of each page.
            let_pass: Waited for before each stretch of `STRETCH_BYTES`.
        """
        step = max(1, STRETCH_BYTES // self._page_bytes)
        arena, tell = self._arenas[rank], self._teller(digest, rank)
        for start in range(0, len(slots), step):
            await let_pass()
            pages = image.pages[start : start + step]
            if arena is None:
                await self._send_chunks(digest, rank, start * self._page_bytes, pages)
            else:
                numbers = range(start, start + len(pages))
                await self._copy(partial(_copy, arena, slots, image.pages, tell), numbers)
            self._metrics.push_bytes.labels("chunks" if arena is None else "shared_memory").inc(pages.nbytes)

    def close(self) -> None:
        """Let go of the arenas; nothing may be writing."""
        for arena in self._arenas:
            if arena is not None:
                arena.close()
        self._arenas.clear()

    def _teller(self, digest: str, rank: int) -> Callable[[int], None]:
        """Return what a thread calls with the number of each page that it has written."""
        if not self._tells_written:
            return lambda _: None
        loop = asyncio.get_running_loop()

        def tell(page: int) -> None:
            loop.call_soon_threadsafe(self._outbox.note_written, digest, rank, (page,))

        return tell

    async def _copy(self, copy: Callable[[range], None], numbers: range) -> None:
        """Copy pages, several threads side by side: one reaches a fraction of what memory gives."""
        run = asyncio.get_running_loop().run_in_executor
        num = min(COPY_THREADS, len(numbers))
        copies = [run(self._executor, copy, numbers[first::num]) for first in range(num)]
        # Shielded: threads go on writing although their waiter is cancelled, so the waiter must wait for all.
        await _uninterrupted(asyncio.gather(*copies, return_exceptions=True))
        for each in copies:
            each.result()

    async def _send_chunks(self, digest: str, rank: int, offset: int, pages: NDArray[np.uint8]) -> None:
        for page in pages:
            for start in range(0, len(page), MAX_CHUNK_BYTES):
                data = page[start : start + MAX_CHUNK_BYTES].tobytes()
                await self._outbox.put(Chunk(digest, rank, offset + start, data))
            offset += len(page)


def _copy(
    arena: SharedArena,
    slots: tuple[int, ...],
    pages: NDArray[np.uint8],
    tell: Callable[[int], None],
    numbers: range,
) -> None:
    for number in numbers:
        arena.write(slots[number], pages[number])
        tell(number)


async def _uninterrupted(work: asyncio.Future[Any]) -> None:
    """Wait for work in a thread to its end, even if cancelled; the cancellation is raised afterwards."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
