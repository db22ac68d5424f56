"""Finds the images of one engine's transfers, and fills the slots granted for them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import image_sha256
from loraplex_common.tree_digest import tree_sha256

from loraplex_adapter_store.attach.image_writer import ImageWriter
from loraplex_adapter_store.attach.messages import Offer
from loraplex_adapter_store.attach.urgency import UrgencyGate
from loraplex_adapter_store.page_image import Fit, ImageKey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Executor

    from loraplex_adapter_store.attach.messages import Hello
    from loraplex_adapter_store.attach.outbox import Outbox
    from loraplex_adapter_store.attach.transfer import Transfer
    from loraplex_adapter_store.images import ImageCache
    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.page_image import Image


MAX_FINDING: Final = 4
"""Images of one engine that are read or derived side by side; those that are needed first go first."""


class Filler:
    """Serves one engine.

    Args:
        hello: The engine.
        images: Gives images out.
        outbox: Takes chunks for arenas that cannot be reached from here.
        executor: Runs the copies into shared memory.
        metrics: Counts the bytes.
    """

    def __init__(
        self, hello: Hello, images: ImageCache, outbox: Outbox, executor: Executor, metrics: StoreMetrics
    ) -> None:
        self._hello = hello
        self._images = images
        self._executor = executor
        self._fit = Fit(hello.base_fingerprint, hello.max_image_pages)
        self._gate = UrgencyGate(MAX_FINDING)
        self._writer = ImageWriter(hello, outbox, executor, metrics)

    @property
    def shared_memory(self) -> list[bool]:
        """Per rank, whether pages are written straight into the arena."""
        return self._writer.shared_memory

    async def offers(self, transfer: Transfer) -> list[Offer]:
        """Return a transfer's offers, one for each rank; an image that is at hand nowhere is not derived for its offer.

        Raises:
            LoraplexError: In the cases of `ImageCache.get`.
        """
        async with self._gate.turn(transfer):
            return [await self._offer(transfer, rank) for rank in range(len(self._hello.arenas))]

    async def fill(
        self, transfer: Transfer, rank: int, slots: tuple[int, ...], let_pass: Callable[[], Awaitable[None]]
    ) -> str:
        """Bring one rank's image into its slots; return its tree digest.

        Pages of an image that has to be derived are written into the arena as each is finished.

        Args:
            transfer: The transfer.
            rank: The rank.
            slots: Arena slot of each page.
            let_pass: Waited for before each stretch of an image that is at hand.

        Raises:
            LoraplexError: In the cases of `ImageCache.get`; nothing is written any more then.
        """
        async with self._gate.turn(transfer), self._writer.sink(transfer.digest, rank, slots) as sink:
            image = await self._images.get(self._key(transfer, rank), self._fit, sink)
            is_written = sink is not None and sink.is_complete
        if is_written:
            self._writer.note_written(image.pages.nbytes)
        else:
            await self._writer.write(transfer.digest, rank, image, slots, let_pass)
        return image.tree_sha256

    def close(self) -> None:
        """Let go of the arenas; nothing may be writing."""
        self._writer.close()

    async def _offer(self, transfer: Transfer, rank: int) -> Offer:
        key, sha256 = self._key(transfer, rank), ""
        if self._hello.takes_tree_digests:
            plan = await self._images.plan(key, self._fit)
        else:  # an engine of an earlier version checks the digest that comes with the offer
            image = await self._hashed(key)
            run = asyncio.get_running_loop().run_in_executor
            plan, sha256 = image.plan, await run(self._executor, image_sha256, image.pages)
        return Offer(transfer.digest, rank, plan.num_pages, sha256, transfer.is_wanted, plan.spec.to_json())

    async def _hashed(self, key: ImageKey) -> Image:
        """Return an image whose bytes have its tree digest: an engine that knows none cannot compare them with it."""
        run = asyncio.get_running_loop().run_in_executor
        image = await self._images.get(key, self._fit)
        if await run(self._executor, tree_sha256, image.pages) != image.tree_sha256:
            self._images.drop(key.digest, is_damaged=True)
            image = await self._images.get(key, self._fit)
        return image

    def _key(self, transfer: Transfer, rank: int) -> ImageKey:
        return ImageKey(transfer.digest, self._hello.geometry, rank)
