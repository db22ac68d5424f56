"""Derives one page image from its canonical form, while that arrives: read, hash and pack side by side.

A thread reads from Valkey, and starts others as bytes arrive; the event loop takes no part, as each of its turns would wait for
the interpreter's lock, and the bytes for it. From elsewhere the event loop reads. A chunk is hashed while the next one is read. A
layer is packed as soon as its bytes have arrived, a page hashed as soon as the layers in it are packed, by the thread that packed the
last of them: the page is in that core's cache then. The same thread hands the page on, to the arena of the engine that waits.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from loraplex_common.adapter_image import ImagePacker
from loraplex_common.errors import AdapterCorruptError, AdapterCorruptUploadError
from loraplex_common.tree_digest import piece_digests, tree_root

from loraplex_adapter_store.canonical_check import CanonicalCheck
from loraplex_adapter_store.checkpoint.canonical import CanonicalReader
from loraplex_adapter_store.checkpoint.canonical_header import LENGTH_BYTES, header_bytes
from loraplex_adapter_store.thread_work import ThreadWork

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Executor, Future

    from loraplex_common.adapter_image import ModuleSpec
    from numpy.typing import NDArray

    from loraplex_adapter_store.buffers import BufferPool
    from loraplex_adapter_store.page_image import ImageKey
    from loraplex_adapter_store.repository.blobs import BulkRead, Manifest

    PageSink: TypeAlias = Callable[[int, NDArray[np.uint8]], None]
    """Takes a finished page with its number, in a thread; what it raises ends the derivation."""


class Derivation:
    """One image in the making.

    Args:
        key: The image.
        manifest: Describes its canonical form.
        executor: Its threads do the work.
        buffers: Memory of canonical form and image.
        sink: Is given each page as soon as it is finished; None if nothing waits for pages.
        known_root: The image's tree digest, if an earlier derivation recorded it. Nothing is hashed then: the engine
            compares the image with that, and names what is damaged.

    Attributes:
        pages: ``[num_pages, page_bytes]``, uint8; complete once `run` has ended.

    Raises:
        ImageError: If the adapter cannot be laid out.
    """

    def __init__(
        self,
        key: ImageKey,
        manifest: Manifest,
        executor: Executor,
        buffers: BufferPool,
        sink: PageSink | None = None,
        known_root: str = "",
    ) -> None:
        self._digest = key.digest
        self._manifest = manifest
        self._work = ThreadWork(executor)
        self._sink = sink
        self._known_root = known_root
        self._packer = ImagePacker(key.geometry, manifest.spec, key.rank)
        self._data = buffers.take(manifest.num_bytes)
        self._check = CanonicalCheck(key.digest, manifest.tree_sha256, self._data.data, self._work)
        self._reader: CanonicalReader | None = None
        self._waiting: list[tuple[int, int]] = []  # (bytes needed, layer), the earliest last
        self._modules: dict[int, list[ModuleSpec]] = {}
        self._lock = threading.Lock()
        self._layers_left = _layers_by_page(self._packer)
        self._digests: list[bytes] = [b""] * self._packer.num_pages
        room = buffers.take(self._packer.num_pages * key.geometry.page_bytes)
        self.pages = room.reshape(self._packer.num_pages, key.geometry.page_bytes)

    @property
    def canonical(self) -> NDArray[np.uint8]:
        """The canonical form; complete and checked once `run` has returned."""
        return self._data

    async def run(self, rest: Callable[[int], AsyncGenerator[bytes, None]], bulk: BulkRead | None = None) -> str:
        """Derive the image; when this ends, also with an error, no thread works on it any more.

        Args:
            rest: Gives the canonical form from a byte on, each chunk checked.
            bulk: Reads as much as it can before that.

        Returns:
            The image's tree digest.

        Raises:
            AdapterCorruptError: If the bytes are not those of the revision.
            ImageError: If a value is not finite in the image's dtype.
        """
        try:
            start = await self._read_bulk(bulk) if bulk is not None else 0
            if start < len(self._data):
                await self._read(rest(start), start)
            await self._work.done()
            if not self._known_root:
                await self._work.run(self._check.finish)
        finally:
            await self._work.quiet()
        self._check_spec()
        return self._known_root or tree_root(self._digests)

    async def _read_bulk(self, bulk: BulkRead) -> int:
        """Let a thread read while others hash and pack; return how many bytes have arrived."""
        reading, position = ThreadWork(bulk.executor), 0
        is_stopped = threading.Event()

        def arrived(stop: int) -> bool:
            nonlocal position
            position = stop
            self._arrived(stop)
            return not is_stopped.is_set()

        try:
            reading.start(bulk.read, self._data.data, arrived)
            await reading.done()
        finally:
            is_stopped.set()
            await reading.quiet()
        return position

    async def _read(self, chunks: AsyncGenerator[bytes, None], start: int) -> None:
        """Read the chunks from a byte on; start the packing of each layer that has arrived."""
        position = start
        taking: Future[None] | None = None
        async with aclosing(chunks):
            async for chunk in chunks:
                if taking is not None:
                    await asyncio.wrap_future(taking)
                    self._arrived(position)
                taking = self._work.start(self._take, position, chunk)
                position += len(chunk)
        if position != len(self._data):
            raise AdapterCorruptError(f"revision {self._digest}: {position} bytes are stored, not {len(self._data)}")
        if taking is not None:
            await asyncio.wrap_future(taking)
        self._arrived(position)

    def _arrived(self, position: int) -> None:
        """Start the hashing of what has arrived, and the packing of each layer that has; called in one thread at a time."""
        if not self._known_root:
            self._check.add(position)
        self._start_layers(position)

    def _start_layers(self, arrived: int) -> None:
        if self._reader is None and not self._read_header(arrived):
            return
        while self._waiting and self._waiting[-1][0] <= arrived:
            self._work.start(self._pack, self._waiting.pop()[1])

    def _read_header(self, arrived: int) -> bool:
        """Read the header once it has arrived; return whether it has."""
        view = self._data.data
        if arrived < LENGTH_BYTES or arrived < min(header_bytes(view), len(view)):
            return False
        try:
            self._reader = CanonicalReader(view, self._digest)
        except (AdapterCorruptUploadError, ValueError, KeyError, TypeError) as error:
            raise AdapterCorruptError(f"revision {self._digest}: its stored header is unreadable: {error}") from error
        self._waiting = sorted(((needed, layer) for layer, needed in self._reader.bytes_needed.items()), reverse=True)
        if {layer for _, layer in self._waiting} != set(self._packer.pages_of):
            raise self._other_spec()
        return True

    def _take(self, position: int, chunk: bytes) -> None:
        self._data[position : position + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)

    def _pack(self, layer: int) -> None:
        assert self._reader is not None
        modules, tensors = self._reader.layer(layer)
        self._packer.pack_layer(layer, tensors, self.pages, is_known_finite=bool(self._known_root))
        self._modules[layer] = modules
        for page in self._finished(layer):
            self._packer.clear_gaps(page, self.pages)
            if not self._known_root:
                self._digests[page] = piece_digests(self.pages[page].data)
            if self._sink is not None:
                self._sink(page, self.pages[page])

    def _finished(self, layer: int) -> list[int]:
        """Return the pages to which a layer was the last to write."""
        finished: list[int] = []
        with self._lock:
            for page in self._packer.pages_of[layer]:
                self._layers_left[page] -= 1
                if not self._layers_left[page]:
                    finished.append(page)
        return finished

    def _check_spec(self) -> None:
        assert self._reader is not None
        modules = (module for layer in self._reader.bytes_needed for module in self._modules[layer])
        is_same_base = self._reader.base_fingerprint == self._manifest.base_fingerprint
        if not is_same_base or self._reader.spec_of(modules) != self._manifest.spec:
            raise self._other_spec()

    def _other_spec(self) -> AdapterCorruptError:
        return AdapterCorruptError(
            f"revision {self._digest}: its manifest describes another adapter than its weights; import the adapter again"
        )


def _layers_by_page(packer: ImagePacker) -> list[int]:
    """Return by page how many layers have tiles in it."""
    counts = [0] * packer.num_pages
    for pages in packer.pages_of.values():
        for page in pages:
            counts[page] += 1
    return counts
