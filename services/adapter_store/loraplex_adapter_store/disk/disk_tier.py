"""Images and canonical forms on disk, for the event loop: found, checked, mapped; written in the background."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
from loraplex_common.adapter_image import AdapterSpec
from loraplex_common.housekeeping import Trouble
from loraplex_common.log import get_logger
from loraplex_common.tree_digest import tree_root

from loraplex_adapter_store.disk.cache_file import CacheFile, CacheFileError, open_cache_file, write_cache_file
from loraplex_adapter_store.page_image import Image, ImageKey, geometry_id
from loraplex_adapter_store.thread_work import ThreadWork

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Executor

    from loraplex_common.adapter_image import Geometry
    from numpy.typing import NDArray

    from loraplex_adapter_store.disk.disk_index import DiskIndex
    from loraplex_adapter_store.metrics import StoreMetrics

_log = get_logger()
CHECKED_BYTES: Final = 16 * 1024 * 1024
"""Bytes of a body that one thread checks."""
MAX_WAITING: Final = 8
"""Files that may wait to be written: they are in memory meanwhile. More are not kept."""
CANONICAL_PAGE_BYTES: Final = 1024 * 1024
_UNREADABLE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What a header raises that is whole, but not what this version writes."""
T = TypeVar("T")


class DiskTier:
    """Never an only copy: what is missing or damaged is derived again, and a disk that fails costs time only.

    Args:
        index: The directory.
        executor: Its threads check files.
        metrics: Counts damaged files.
    """

    def __init__(self, index: DiskIndex, executor: Executor, metrics: StoreMetrics) -> None:
        self._index = index
        self._executor = executor
        self._metrics = metrics
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._num_waiting = 0
        self._checked: dict[str, tuple[CacheFile, tuple[int, int]]] = {}  # by name; with inode and bytes at the check
        self._trouble = Trouble()

    async def image(self, key: ImageKey) -> Image | None:
        """Return an image, its pages mapped; None if there is none, or it was damaged and is deleted now."""
        return await self._open(_image_name(key), _image_in)

    async def canonical(self, digest: str) -> AsyncGenerator[bytes, None] | None:
        """Return a canonical form in pieces; None as in `image`."""
        data = await self._open(f"{digest}.canonical", _canonical_in)
        return None if data is None else _pieces(data)

    def keep_image(self, key: ImageKey, image: Image) -> None:
        """Write an image in the background."""
        fields = {"base": image.base_fingerprint, "spec": image.spec.to_json().decode(), "tree": image.tree_sha256}
        self._write(_image_name(key), fields, image.pages)

    def keep_canonical(self, digest: str, data: NDArray[np.uint8]) -> None:
        """Write a canonical form, checked against its digest by the caller, in the background."""
        padded = np.zeros(-(-len(data) // CANONICAL_PAGE_BYTES) * CANONICAL_PAGE_BYTES, dtype=np.uint8)
        padded[: len(data)] = data
        self._write(f"{digest}.canonical", {"bytes": len(data)}, padded.reshape(-1, CANONICAL_PAGE_BYTES))

    def drop(self, digest: str) -> None:
        """Delete all files of a revision."""
        for name, _ in self._index.files():
            if name.startswith(digest):
                self._remove(name)

    def recent(self, geometry: Geometry) -> dict[str, int]:
        """Return the digests whose images of a geometry are here with about their pages, most recently used first."""
        part = f"-{geometry_id(geometry)}-"
        found: dict[str, int] = {}
        for name, num_bytes in self._index.files():
            if part in name:
                found.setdefault(name.partition("-")[0], num_bytes // geometry.page_bytes)
        return found

    async def close(self) -> None:
        """Finish what is being written, drop what waits, and let go of the directory."""
        await asyncio.to_thread(self._writer.shutdown, cancel_futures=True)
        self._index.close()

    async def _open(self, name: str, read: Callable[[CacheFile], T]) -> T | None:
        if not self._index.touch(name):
            return None
        try:
            return read(await self._checked_file(name))
        except (CacheFileError, OSError, *_UNREADABLE) as error:
            if isinstance(error, FileNotFoundError) and not self._index.touch(name):
                return None  # deleted since it was asked for: for its room, or with its revision
            self._metrics.verify_failures.inc()
            _log.warning("a file of the disk cache is damaged and deleted", file=name, error=str(error))
            self._remove(name)
            return None

    async def _checked_file(self, name: str) -> CacheFile:
        path = self._index.directory / name
        descriptor = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        work = ThreadWork(self._executor)
        try:
            status = os.fstat(descriptor)
            state = (status.st_ino, status.st_size)
            known = self._checked.get(name)
            if known is not None and known[1] == state:
                return known[0]
            file = await asyncio.to_thread(open_cache_file, path, descriptor)
            if file.fields.get("name") != name:
                raise CacheFileError(f"it is a copy of {file.fields.get('name')}")
            step = max(1, CHECKED_BYTES // file.shape[1])
            for start in range(0, file.shape[0], step):
                work.start(file.check_pages, descriptor, start, min(start + step, file.shape[0]))
            await work.done()
            self._checked[name] = (file, state)
            return file
        finally:
            await work.quiet()
            os.close(descriptor)

    def _write(self, name: str, fields: dict[str, Any], pages: NDArray[np.uint8]) -> None:
        if self._num_waiting >= MAX_WAITING:
            return
        self._num_waiting += 1
        future = self._writer.submit(self._write_file, name, fields, pages)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._written))

    def _written(self) -> None:
        self._num_waiting -= 1

    def _write_file(self, name: str, fields: dict[str, Any], pages: NDArray[np.uint8]) -> None:
        try:
            if self._index.touch(name) or not self._index.make_room(pages.nbytes):
                return
            num_bytes = write_cache_file(self._index.directory / name, {**fields, "name": name}, pages)
        except (OSError, CacheFileError) as error:
            self._trouble.warn(
                "the disk cache cannot be written; images are derived again after a restart",
                directory=str(self._index.directory),
                error=str(error),
            )
            return
        self._index.add(name, num_bytes)
        self._index.make_room(0)
        self._trouble.over("the disk cache is written again")

    def _remove(self, name: str) -> None:
        self._checked.pop(name, None)
        try:
            self._index.remove(name)
        except OSError as error:
            self._trouble.warn("a file of the disk cache cannot be deleted", file=name, error=error.strerror)


def _image_in(file: CacheFile) -> Image:
    spec = AdapterSpec.from_json(file.fields["spec"].encode())
    return Image(spec, str(file.fields["base"]), file.body(), tree_root([file.digests]))


def _canonical_in(file: CacheFile) -> NDArray[np.uint8]:
    num_bytes, data = int(file.fields["bytes"]), file.body().reshape(-1)
    if not 0 < num_bytes <= len(data):
        raise CacheFileError(f"{num_bytes} of {len(data)} bytes are said to count")
    return data[:num_bytes]


async def _pieces(data: NDArray[np.uint8]) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), 2 * CANONICAL_PAGE_BYTES):
        yield data[start : start + 2 * CANONICAL_PAGE_BYTES].tobytes()
        await asyncio.sleep(0)


def _image_name(key: ImageKey) -> str:
    return f"{key.digest}-{geometry_id(key.geometry)}-{key.rank}.image"
