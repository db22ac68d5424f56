"""Computes the digests of images that have arrived in the arena, in threads of their own."""

from __future__ import annotations

import asyncio
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from loraplex_common.tree_digest import piece_digests, tree_root

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

MAX_THREADS: Final = 8


class ImageCheck:
    """A few threads: the step loop and other engines need the cores too."""

    def __init__(self) -> None:
        self._num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="image-hash")

    async def digest(self, arena: NDArray[np.uint8], slots: Sequence[int], *, is_tree: bool) -> str:
        """Return an image's digest, 64 hex digits.

        Args:
            arena: ``[num_slots, page_bytes]``.
            slots: Slot of each page.
            is_tree: Whether the tree digest is wanted; else it is sha256 over all pages, which one thread computes.
        """
        run = asyncio.get_running_loop().run_in_executor
        if not is_tree:
            return await run(self._threads, _sha256, arena, slots)
        shares = [slots[first :: self._num_threads] for first in range(min(self._num_threads, len(slots)))]
        found = await asyncio.gather(*(run(self._threads, _page_digests, arena, share) for share in shares))
        return tree_root(found[page % len(found)][page // len(found)] for page in range(len(slots)))

    def close(self) -> None:
        """Begin no more work; what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _page_digests(arena: NDArray[np.uint8], slots: Sequence[int]) -> list[bytes]:
    return [piece_digests(arena[slot].data) for slot in slots]


def _sha256(arena: NDArray[np.uint8], slots: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for slot in slots:
        digest.update(arena[slot].data)
    return digest.hexdigest()
