"""Computes the digests of images in the arena, in threads of their own, while their last pages are on the way."""

from __future__ import annotations

import asyncio
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from loraplex_common.tree_digest import piece_digests, tree_root

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor, Future

    import numpy as np
    from numpy.typing import NDArray

MAX_THREADS: Final = 8


class ImageHash:
    """The digest of one image, whose pages are hashed as they are written.

    Args:
        threads: They do the hashing.
        arena: ``[num_slots, page_bytes]``.
        slots: Slot of each page.
    """

    def __init__(self, threads: Executor, arena: NDArray[np.uint8], slots: Sequence[int]) -> None:
        self._threads = threads
        self._arena = arena
        self._slots = slots
        self._digests: dict[int, Future[bytes]] = {}

    def add(self, pages: Iterable[int]) -> None:
        """Begin to hash pages, which have been written; a page that was hashed before is hashed anew.

        Args:
            pages: Their numbers in the image.
        """
        for page in pages:
            if (earlier := self._digests.get(page)) is not None:
                earlier.cancel()
            self._digests[page] = self._threads.submit(_page_digest, self._arena, self._slots[page])

    async def tree_sha256(self) -> str:
        """Return the tree digest, 64 hex digits, of an image that is complete; pages that were not added are hashed now."""
        self.add(page for page in range(len(self._slots)) if page not in self._digests)
        digests = [asyncio.wrap_future(self._digests[page]) for page in range(len(self._slots))]
        return tree_root(await asyncio.gather(*digests))

    async def sha256(self) -> str:
        """Return sha256 over all pages in order, 64 hex digits, which one thread computes."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, _sha256, self._arena, self._slots)

    def cancel(self) -> None:
        """Begin to hash no more pages; those that are being hashed are read to their end."""
        for digest in self._digests.values():
            digest.cancel()


class ImageCheck:
    """A few threads: the step loop and other engines need the cores too."""

    def __init__(self) -> None:
        num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="image-hash")

    def begin(self, arena: NDArray[np.uint8], slots: Sequence[int]) -> ImageHash:
        """Return what hashes an image.

        Args:
            arena: ``[num_slots, page_bytes]``.
            slots: Slot of each page.
        """
        return ImageHash(self._threads, arena, slots)

    def close(self) -> None:
        """Begin no more work; what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _page_digest(arena: NDArray[np.uint8], slot: int) -> bytes:
    return piece_digests(arena[slot].data)


def _sha256(arena: NDArray[np.uint8], slots: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for slot in slots:
        digest.update(arena[slot].data)
    return digest.hexdigest()
