"""The threads of downloads: they may take hours, and checks of checkpoints must not wait for them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_DOWNLOADS: Final = 8
"""Concurrent downloads, from all sources together; further ones wait."""

T = TypeVar("T")


class DownloadThreads:
    """Runs downloads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_DOWNLOADS, thread_name_prefix="download")

    async def run(self, download: Callable[[], T]) -> T:
        """Call a function in a thread, once one is free."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, download)

    async def close(self) -> None:
        """Start no further downloads and wait for those that run; they end as soon as they ask for room."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
