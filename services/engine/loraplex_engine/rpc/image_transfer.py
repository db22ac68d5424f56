"""Takes images from the store into the arena: asks for room, receives the bytes, verifies them.

The offers of an adapter's images, one for each tensor-parallel rank, have one task. It asks the step loop's thread for slots,
grants the same ones for all ranks to the store, waits until the store reports that they are filled, verifies the images' digests
and hands them over together. Copies and hashes run in worker threads.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import crc32c
import numpy as np
from loraplex_common.adapter_image import AdapterSpec, layout
from loraplex_common.errors import AdapterCorruptError, AdapterIncompatibleError, LoraplexError, RequestTooLargeError

from loraplex_engine.messages import ImageArrived, ImageRefused
from loraplex_engine.rpc.image_check import ImageCheck
from loraplex_engine.rpc.image_offer import ImageOffer, Stage, Transfer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.rpc.image_check import ImageHash

QUARANTINE_S: Final = 5.0
"""How long slots of a broken stream stay unused: a store that shares the arena may still be writing a page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferCallbacks:
    """How a transfer answers the store; called on the asyncio loop.

    Attributes:
        grant: Called with (digest, rank, slots).
        decline: Called with (digest).
        fail: Called with (digest, error); the store then sends the image again.
    """

    grant: Callable[[str, int, tuple[int, ...]], None]
    decline: Callable[[str], None]
    fail: Callable[[str, LoraplexError], None]


class ImageTransfers:
    """All transfers of one engine.

    Args:
        engine: The engine whose arena is filled.
        max_image_pages: Pages of the largest image that the pool can ever hold.
        callbacks: Answer the store.

    Attributes:
        is_shared: Whether the store writes into the arena itself.
    """

    def __init__(self, engine: Engine, max_image_pages: int, callbacks: TransferCallbacks) -> None:
        self._engine = engine
        self._max_image_pages = max_image_pages
        self._callbacks = callbacks
        self._num_ranks = len(engine.arena.views)
        self._transfers: dict[str, Transfer] = {}
        self._quarantined: dict[tuple[int, ...], asyncio.TimerHandle] = {}
        self._check = ImageCheck()
        self.is_shared = False

    @property
    def num_open(self) -> int:
        """Transfers that are neither complete nor given up."""
        return len(self._transfers)

    def is_prefetching(self, digest: str) -> bool:
        """Tell whether slots are granted to an unsolicited image that is not complete yet."""
        transfer = self._transfers.get(digest)
        return transfer is not None and transfer.stage is not Stage.OFFERED and not transfer.offer.is_wanted

    async def offered(self, offer: ImageOffer) -> None:
        """Take an offer up. The store repeats the offer of an unsolicited image when the image gets wanted."""
        if not 0 <= offer.rank < self._num_ranks:
            error = AdapterCorruptError(
                f"image {offer.digest} is of rank {offer.rank}, this engine has {self._num_ranks}"
            )
            self._callbacks.fail(offer.digest, error)
            return
        transfer = self._transfers.get(offer.digest)
        if transfer is not None and offer.rank not in transfer.offers:
            transfer.offers[offer.rank] = offer
        else:
            if transfer is not None:
                if transfer.stage is not Stage.OFFERED:
                    return  # its slots are granted already
                await self._stop(transfer, is_quiet=True)
            transfer = self._transfers[offer.digest] = Transfer(offer, self._num_ranks)
        if transfer.is_complete:
            transfer.task = asyncio.create_task(self._run(transfer), name=f"image-{offer.digest[:8]}")

    async def write(self, digest: str, rank: int, offset: int, data: bytes, checksum: int) -> None:
        """Copy a chunk into its slot; chunks of a transfer that was given up are ignored.

        Args:
            digest: Digest of the image's adapter.
            rank: Tensor-parallel rank of the part.
            offset: Position in the image, in bytes.
            data: The bytes; they must not cross a page boundary.
            checksum: crc32c of ``data``.
        """
        if (transfer := self._filling(digest, rank)) is None:
            return
        view = self._engine.arena.views[rank]
        problem = await asyncio.to_thread(_copy, view, transfer.slots, offset, data, checksum)
        if problem is not None and self._transfers.get(digest) is transfer:
            await self._fail(transfer, problem)

    async def written(self, digest: str, rank: int, pages: Sequence[int]) -> None:
        """Hash pages that the store has written into shared memory, while it writes others.

        Args:
            digest: Digest of the image's adapter.
            rank: Tensor-parallel rank of the part.
            pages: Their numbers in the image.
        """
        if (transfer := self._filling(digest, rank)) is None:
            return
        if any(page >= len(transfer.slots) for page in pages):
            await self._fail(transfer, f"page {max(pages)} of {len(transfer.slots)} is said to be written")
        else:
            transfer.hashes[rank].add(pages)

    def filled(self, digest: str, rank: int, tree_sha256: str) -> None:
        """Note the store's report that the last byte is in place.

        Args:
            digest: Digest of the image's adapter.
            rank: Tensor-parallel rank of the part.
            tree_sha256: See `loraplex_common.tree_digest`; empty from stores that know of none.
        """
        transfer = self._transfers.get(digest)
        if transfer is not None and 0 <= rank < self._num_ranks and not transfer.filled[rank].done():
            transfer.filled[rank].set_result(tree_sha256)

    async def abandon(self, digest: str) -> None:
        """Give up an adapter's transfers; the store has stopped writing them."""
        if (transfer := self._transfers.get(digest)) is not None:
            await self._stop(transfer, is_quiet=True)

    async def abandon_all(self) -> None:
        """Give up all transfers, as the stream is gone; the next stream starts from the residency that it reports."""
        for transfer in list(self._transfers.values()):
            await self._stop(transfer, is_quiet=not self.is_shared)

    def close(self) -> None:
        """Give quarantined slots back at once, as the engine is about to end."""
        for slots, timer in self._quarantined.items():
            timer.cancel()
            self._engine.return_slots(slots)
        self._quarantined.clear()
        self._check.close()

    async def _run(self, transfer: Transfer) -> None:
        offer = transfer.offer
        try:
            spec = self._checked_spec(transfer)
            slots = await self._granted(offer)
            if slots is None:
                self._callbacks.decline(offer.digest)
                return
            transfer.slots, transfer.stage = slots, Stage.FILLING
            transfer.hashes = tuple(self._check.begin(view, slots) for view in self._engine.arena.views)
            for rank in range(self._num_ranks):
                self._callbacks.grant(offer.digest, rank, slots)
            tree_digests = await asyncio.gather(*transfer.filled)
            transfer.stage = Stage.VERIFYING
            for rank, tree_sha256 in enumerate(tree_digests):
                await self._verify(transfer.offers[rank], transfer.hashes[rank], tree_sha256)
            transfer.slots = ()
            self._engine.post(ImageArrived(spec, slots))
        except (RequestTooLargeError, AdapterIncompatibleError) as error:
            self._callbacks.decline(offer.digest)
            self._engine.post(ImageRefused(offer.digest, error))
        except AdapterCorruptError as error:
            self._return(transfer, is_quiet=True)
            self._callbacks.fail(offer.digest, error)
        finally:
            self._forget(transfer)

    async def _verify(self, offer: ImageOffer, image: ImageHash, tree_sha256: str) -> None:
        """Check one rank's image.

        Raises:
            AdapterCorruptError: If it is another than was offered.
        """
        expected = tree_sha256 or offer.image_sha256
        found = await (image.tree_sha256() if tree_sha256 else image.sha256())
        if found != expected:
            where = f" of rank {offer.rank}" if self._num_ranks > 1 else ""
            raise AdapterCorruptError(f"image {offer.digest}{where}: sha256 is {found}, expected {expected}")

    def _filling(self, digest: str, rank: int) -> Transfer | None:
        """Return the transfer of an image that is being written; None of one that was given up, or has no such rank."""
        found = self._transfers.get(digest)
        return found if found is not None and found.stage is Stage.FILLING and 0 <= rank < self._num_ranks else None

    async def _fail(self, transfer: Transfer, problem: str) -> None:
        digest = transfer.offer.digest
        await self.abandon(digest)
        self._callbacks.fail(digest, AdapterCorruptError(f"image {digest}: {problem}"))

    def _forget(self, transfer: Transfer) -> None:
        for image in transfer.hashes:
            image.cancel()
        if self._transfers.get(transfer.offer.digest) is transfer:
            del self._transfers[transfer.offer.digest]

    def _checked_spec(self, transfer: Transfer) -> AdapterSpec:
        """Return the offers' spec if it describes these images.

        Raises:
            AdapterCorruptError: If the spec describes other images.
            RequestTooLargeError: If the image can never fit.
            AdapterIncompatibleError: If the compute backend cannot serve it.
        """
        offer = transfer.offer
        limit = min(self._max_image_pages, self._engine.arena.num_slots)
        if offer.num_pages > limit:
            raise RequestTooLargeError(
                f"adapter {offer.digest} takes {offer.num_pages} pages of {self._engine.limits.page_bytes} bytes; "
                f"the pool has room for {self._max_image_pages} and the arena for {self._engine.arena.num_slots}"
            )
        try:
            spec = AdapterSpec.from_json(offer.spec)
            num_pages = layout(self._engine.geometry, spec.sizes).num_pages
        except (ValueError, KeyError, TypeError) as error:  # ImageError and what json raises among them
            raise AdapterCorruptError(f"image {offer.digest}: unreadable spec: {error}") from error
        for each in transfer.offers.values():
            if spec.digest != each.digest or num_pages != each.num_pages or each.spec != offer.spec:
                raise AdapterCorruptError(
                    f"image {each.digest} rank {each.rank} of {each.num_pages} pages: its spec is of {spec.digest}, {num_pages} "
                    "pages"
                )
        self._engine.check_adapter(spec)
        return spec

    async def _granted(self, offer: ImageOffer) -> tuple[int, ...] | None:
        future = self._engine.grant_slots(
            offer.digest, offer.num_pages, is_wanted=offer.is_wanted, is_expected=offer.is_expected
        )
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # Slots may have been granted in the same moment; without this, they would never be given back.
            future.add_done_callback(functools.partial(_give_back, self._engine))
            raise

    async def _stop(self, transfer: Transfer, *, is_quiet: bool) -> None:
        """Cancel a transfer; ``is_quiet`` tells that the store no longer writes to its slots."""
        if transfer.task is not None:
            transfer.task.cancel()
            await asyncio.wait([transfer.task])
        self._forget(transfer)  # also one whose task never began
        self._return(transfer, is_quiet=is_quiet or transfer.stage is Stage.VERIFYING)

    def _return(self, transfer: Transfer, *, is_quiet: bool) -> None:
        slots, transfer.slots = transfer.slots, ()
        if not slots:
            return
        if is_quiet:
            self._engine.return_slots(slots)
            return
        loop = asyncio.get_running_loop()
        self._quarantined[slots] = loop.call_later(QUARANTINE_S, self._release, slots)

    def _release(self, slots: tuple[int, ...]) -> None:
        del self._quarantined[slots]
        self._engine.return_slots(slots)


def _copy(view: NDArray[np.uint8], slots: tuple[int, ...], offset: int, data: bytes, checksum: int) -> str | None:
    """Check a chunk and copy it; return a description of what is wrong with it, or None."""
    page_bytes = view.shape[1]
    page, start = divmod(offset, page_bytes)
    if page >= len(slots) or start + len(data) > page_bytes:
        return f"{len(data)} bytes at {offset} do not lie in one of {len(slots)} pages of {page_bytes} bytes"
    if crc32c.crc32c(data) != checksum:
        return f"crc32c of {len(data)} bytes at {offset} is wrong"
    view[slots[page], start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return None


def _give_back(engine: Engine, future: Future[tuple[int, ...] | None]) -> None:
    if not future.cancelled() and future.exception() is None and (slots := future.result()) is not None:
        engine.return_slots(slots)
