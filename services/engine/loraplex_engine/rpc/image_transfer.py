"""Takes images from the store into the arena: asks for room, receives the bytes, verifies them.

Each offer has one task. It asks the step loop's thread for slots, grants them to the store, waits until the store
reports that they are filled, verifies the image's digest and hands it over. Copies and hashes run in worker threads.
"""

from __future__ import annotations

import asyncio
import enum
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

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loraplex_engine.loop.engine import Engine

QUARANTINE_S: Final = 5.0
"""How long slots of a broken stream stay unused: a store that shares the arena may still be writing a page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOffer:
    """An image that the store offers.

    Attributes:
        image_sha256: sha256 over the image's pages in order, 64 hex digits; empty if the tree digest comes with `filled`.
        is_wanted: False if no request asked for the adapter.
        is_expected: Whether a label is about to move to it, so that requests will ask for it.
        spec: JSON of `AdapterSpec`.
    """

    digest: str
    rank: int
    num_pages: int
    image_sha256: str
    is_wanted: bool
    spec: bytes
    is_expected: bool = False


class Stage(enum.Enum):
    """State of a transfer."""

    OFFERED = "offered"
    FILLING = "filling"
    VERIFYING = "verifying"


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


class _Transfer:
    """The transfer of one image."""

    def __init__(self, offer: ImageOffer) -> None:
        self.offer = offer
        self.stage = Stage.OFFERED
        self.slots: tuple[int, ...] = ()
        self.filled: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None


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
        self._transfers: dict[tuple[str, int], _Transfer] = {}
        self._quarantined: dict[tuple[int, ...], asyncio.TimerHandle] = {}
        self._check = ImageCheck()
        self.is_shared = False

    @property
    def num_open(self) -> int:
        """Transfers that are neither complete nor given up."""
        return len(self._transfers)

    def is_prefetching(self, digest: str) -> bool:
        """Tell whether slots are granted to an unsolicited image that is not complete yet."""
        transfer = self._transfers.get((digest, 0))
        return transfer is not None and transfer.stage is not Stage.OFFERED and not transfer.offer.is_wanted

    async def offered(self, offer: ImageOffer) -> None:
        """Take an offer up. The store repeats the offer of an unsolicited image when the image gets wanted."""
        known = self._transfers.get((offer.digest, offer.rank))
        if known is not None:
            if known.stage is not Stage.OFFERED:
                return  # its slots are granted already
            await self._stop(known, is_quiet=True)
        transfer = _Transfer(offer)
        self._transfers[offer.digest, offer.rank] = transfer
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
        transfer = self._transfers.get((digest, rank))
        if transfer is None or transfer.stage is not Stage.FILLING:
            return
        problem = await asyncio.to_thread(self._copy, transfer.slots, offset, data, checksum)
        if problem is not None and self._transfers.get((digest, rank)) is transfer:
            await self.abandon(digest)
            self._callbacks.fail(digest, AdapterCorruptError(f"image {digest}: {problem}"))

    def filled(self, digest: str, rank: int, tree_sha256: str) -> None:
        """Note the store's report that the last byte is in place.

        Args:
            digest: Digest of the image's adapter.
            rank: Tensor-parallel rank of the part.
            tree_sha256: See `loraplex_common.tree_digest`; empty from stores that know of none.
        """
        transfer = self._transfers.get((digest, rank))
        if transfer is not None and not transfer.filled.done():
            transfer.filled.set_result(tree_sha256)

    async def abandon(self, digest: str) -> None:
        """Give up an adapter's transfers; the store has stopped writing them."""
        for key in [key for key in self._transfers if key[0] == digest]:
            await self._stop(self._transfers[key], is_quiet=True)

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

    async def _run(self, transfer: _Transfer) -> None:
        offer = transfer.offer
        try:
            spec = self._checked_spec(offer)
            slots = await self._granted(offer)
            if slots is None:
                self._callbacks.decline(offer.digest)
                return
            transfer.slots, transfer.stage = slots, Stage.FILLING
            self._callbacks.grant(offer.digest, offer.rank, slots)
            expected = await transfer.filled
            transfer.stage = Stage.VERIFYING
            found = await self._check.digest(self._engine.arena.view, slots, is_tree=bool(expected))
            if found != (expected or offer.image_sha256):
                raise AdapterCorruptError(
                    f"image {offer.digest}: sha256 is {found}, expected {expected or offer.image_sha256}"
                )
            transfer.slots = ()
            self._engine.post(ImageArrived(spec, slots))
        except (RequestTooLargeError, AdapterIncompatibleError) as error:
            self._callbacks.decline(offer.digest)
            self._engine.post(ImageRefused(offer.digest, error))
        except AdapterCorruptError as error:
            self._return(transfer, is_quiet=True)
            self._callbacks.fail(offer.digest, error)
        finally:
            if self._transfers.get((offer.digest, offer.rank)) is transfer:
                del self._transfers[offer.digest, offer.rank]

    def _checked_spec(self, offer: ImageOffer) -> AdapterSpec:
        """Return the offer's spec if it describes this image.

        Raises:
            AdapterCorruptError: If the spec describes another image.
            RequestTooLargeError: If the image can never fit.
            AdapterIncompatibleError: If the compute backend cannot serve it.
        """
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
        if spec.digest != offer.digest or num_pages != offer.num_pages or offer.rank != 0:
            raise AdapterCorruptError(
                f"image {offer.digest} rank {offer.rank} of {offer.num_pages} pages: its spec is of {spec.digest}, {num_pages} pages"
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

    async def _stop(self, transfer: _Transfer, *, is_quiet: bool) -> None:
        """Cancel a transfer; ``is_quiet`` tells that the store no longer writes to its slots."""
        if transfer.task is not None:
            transfer.task.cancel()
            await asyncio.wait([transfer.task])
        self._return(transfer, is_quiet=is_quiet or transfer.stage is Stage.VERIFYING)

    def _return(self, transfer: _Transfer, *, is_quiet: bool) -> None:
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

    def _copy(self, slots: tuple[int, ...], offset: int, data: bytes, checksum: int) -> str | None:
        """Check a chunk and copy it; return a description of what is wrong with it, or None."""
        view = self._engine.arena.view
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
