"""Derives the images of new adapters for the engines that are attached, before any request wants one."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger

from loraplex_adapter_store.page_image import ImageKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import Geometry

    from loraplex_adapter_store.images import ImageCache

_log = get_logger()


class ImagePreparer:
    """Works on one image at a time, behind all that engines want.

    Args:
        images: Derives and keeps them.
        geometries: Returns the geometries of the attached engines that serve a base model, by its fingerprint.
        max_waiting: Adapters that may wait for their turn; the images of more are derived when they are wanted.
    """

    def __init__(
        self, images: ImageCache, geometries: Callable[[str], tuple[Geometry, ...]], *, max_waiting: int
    ) -> None:
        self._images = images
        self._geometries = geometries
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[str, str]] = deque()
        self._wake = asyncio.Event()

    def imported(self, digest: str, base_fingerprint: str) -> None:
        """Take a revision that has been stored; never waits."""
        if len(self._waiting) < self._max_waiting and (digest, base_fingerprint) not in self._waiting:
            self._waiting.append((digest, base_fingerprint))
            self._wake.set()

    async def run(self) -> None:
        """Prepare for ever; an image that cannot be prepared is left to the engine that wants it."""
        while True:
            while self._waiting:
                digest, base_fingerprint = self._waiting.popleft()
                for geometry in self._geometries(base_fingerprint):
                    for rank in range(geometry.tp_degree):
                        await self._prepare(ImageKey(digest, geometry, rank), base_fingerprint)
            self._wake.clear()
            await self._wake.wait()

    async def _prepare(self, key: ImageKey, base_fingerprint: str) -> None:
        try:
            await self._images.prepare(key, base_fingerprint)
        except LoraplexError as error:
            _log.info("an image is not prepared", revision=key.digest, error=error.message)
        except Exception as error:  # a bug: the store must go on, and the engine that wants the image is told
            _log.error("an image could not be prepared", revision=key.digest, exc_info=error)
