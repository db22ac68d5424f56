"""Page images in host RAM: derived from canonical blobs off the event loop, kept under a byte budget."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, Geometry, ImageError, image_sha256, layout, pack
from loraplex_common.errors import AdapterCorruptError, AdapterIncompatibleError, AdapterNotFoundError
from numpy.typing import NDArray

from loraplex_adapter_store.checkpoint.canonical import read_canonical

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.repository.blobs import Blobs, Manifest
    from loraplex_adapter_store.repository.catalog import Catalog


@dataclass(frozen=True, slots=True)
class ImageKey:
    """The facts that an image depends on."""

    digest: str
    geometry: Geometry
    rank: int


@dataclass(frozen=True, slots=True)
class Image:
    """An adapter as one tensor-parallel rank's kernels read it.

    Attributes:
        pages: ``[num_pages, page_bytes]``, uint8, read-only.
        sha256: sha256 over the pages in order, 64 hex digits.
    """

    spec: AdapterSpec
    base_fingerprint: str
    pages: NDArray[np.uint8]
    sha256: str


@dataclass(frozen=True, slots=True)
class Fit:
    """What an engine can take.

    Attributes:
        max_pages: Pages of the largest image that its pool can ever hold.
    """

    base_fingerprint: str
    max_pages: int

    def check_base(self, digest: str, base_fingerprint: str) -> None:
        """Raise `AdapterIncompatibleError` if an adapter is for another base model."""
        if base_fingerprint != self.base_fingerprint:
            raise AdapterIncompatibleError(
                f"revision {digest} is for base model {base_fingerprint}, the engine serves {self.base_fingerprint}"
            )

    def check_pages(self, digest: str, num_pages: int, page_bytes: int, max_rank: int) -> None:
        """Raise `AdapterIncompatibleError` if an image can never fit the pool."""
        if num_pages > self.max_pages:
            size, remedy = (
                (f" (largest rank {max_rank})", "lower the rank") if max_rank else ("", "adapt fewer modules")
            )
            raise AdapterIncompatibleError(
                f"revision {digest}{size} takes {num_pages} pages of {page_bytes} bytes = {num_pages * page_bytes} bytes, the "
                f"engine's pool can hold at most {self.max_pages} pages for one adapter; raise --pool-bytes or {remedy}"
            )


class ImageCache:
    """Gives out images; concurrent requests for the same image share the work.

    Args:
        budget_bytes: Bytes of images kept after their use; an image larger than that is served but not kept.
    """

    def __init__(
        self, blobs: Blobs, catalog: Catalog, metrics: StoreMetrics, *, budget_bytes: int, executor: Executor
    ) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._metrics = metrics
        self._budget_bytes = budget_bytes
        self._executor = executor
        self._kept: OrderedDict[ImageKey, Image] = OrderedDict()  # least recently used first
        self._kept_bytes = 0
        self._building: dict[ImageKey, asyncio.Task[Image]] = {}

    async def get(self, key: ImageKey, fit: Fit) -> Image:
        """Return an image that fits an engine.

        An image in RAM needs no Valkey.

        Raises:
            AdapterNotFoundError: If the revision does not exist.
            AdapterIncompatibleError: If it is for another base model, too large, or cannot be laid out.
            AdapterCorruptError: If the stored bytes do not match their digest.
            StoreUnavailableError: If it is not in RAM and Valkey cannot be reached.
        """
        began = time.monotonic()
        image = self._kept.get(key)
        tier = "host"
        if image is not None:
            self._kept.move_to_end(key)
            fit.check_base(key.digest, image.base_fingerprint)
        else:
            tier = "redis"
            await self._check_before_building(key, fit)
            image = await self._build_once(key)
        fit.check_pages(key.digest, len(image.pages), key.geometry.page_bytes, image.spec.max_rank)
        self._metrics.fetches.labels(tier).inc()
        self._metrics.fetch_bytes.labels(tier).inc(image.pages.nbytes)
        self._metrics.fetch_seconds.labels(tier).observe(time.monotonic() - began)
        return image

    def drop(self, digest: str) -> None:
        """Forget all images of a revision."""
        for key in [key for key in self._kept if key.digest == digest]:
            self._kept_bytes -= self._kept.pop(key).pages.nbytes
        self._metrics.image_cache_bytes.set(self._kept_bytes)

    def recent(self, geometry: Geometry) -> list[str]:
        """Return the digests whose images of this geometry are in RAM, most recently used first."""
        return list(dict.fromkeys(key.digest for key in reversed(self._kept) if key.geometry == geometry))

    def num_pages(self, digest: str, geometry: Geometry) -> int:
        """Return the pages of an image in RAM, for its largest rank; 0 if it is not in RAM."""
        return max(
            (len(image.pages) for key, image in self._kept.items() if (key.digest, key.geometry) == (digest, geometry)),
            default=0,
        )

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if the accounting and the images kept disagree."""
        total = sum(image.pages.nbytes for image in self._kept.values())
        if total != self._kept_bytes or total > self._budget_bytes:
            raise RuntimeError(
                f"image cache: {total} bytes kept, {self._kept_bytes} counted, budget {self._budget_bytes}"
            )

    async def _check_before_building(self, key: ImageKey, fit: Fit) -> None:
        manifest = await self._manifest(key.digest)
        fit.check_base(key.digest, manifest.base_fingerprint)
        try:
            plan = layout(key.geometry, manifest.spec.sizes)
        except ImageError as error:
            raise AdapterIncompatibleError(f"revision {key.digest}: {error}") from error
        fit.check_pages(key.digest, plan.num_pages, key.geometry.page_bytes, manifest.spec.max_rank)

    async def _manifest(self, digest: str) -> Manifest:
        manifest = await self._blobs.manifest(digest)
        if manifest is not None:
            return manifest
        if await self._catalog.get_revisions([digest]):
            raise AdapterCorruptError(f"revision {digest}: its weights are gone from Valkey; import the adapter again")
        raise AdapterNotFoundError(f"revision {digest} does not exist")

    async def _build_once(self, key: ImageKey) -> Image:
        task = self._building.get(key)
        if task is None:
            task = asyncio.create_task(self._build(key), name=f"image {key.digest[:12]}")
            self._building[key] = task
            task.add_done_callback(lambda _: self._building.pop(key, None))
        return await asyncio.shield(task)  # other callers may wait for it even if this one goes away

    async def _build(self, key: ImageKey) -> Image:
        manifest = await self._manifest(key.digest)
        data = bytearray()
        try:
            async for chunk in self._blobs.read(key.digest, manifest):
                data += chunk
            image = await asyncio.get_running_loop().run_in_executor(self._executor, _derive, key, data)
        except AdapterCorruptError:
            self._metrics.verify_failures.inc()
            raise
        except ImageError as error:
            raise AdapterIncompatibleError(f"revision {key.digest}: {error}") from error
        self._keep(key, image)
        return image

    def _keep(self, key: ImageKey, image: Image) -> None:
        if image.pages.nbytes > self._budget_bytes:
            return
        while self._kept_bytes + image.pages.nbytes > self._budget_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.pages.nbytes
        self._kept[key] = image
        self._kept_bytes += image.pages.nbytes
        self._metrics.image_cache_bytes.set(self._kept_bytes)


def _derive(key: ImageKey, data: bytearray) -> Image:
    """Verify a canonical blob and lay it out; runs in a thread."""
    adapter = read_canonical(data, key.digest)
    pages = pack(key.geometry, adapter.spec, adapter.tensors, key.rank)
    pages.setflags(write=False)
    return Image(adapter.spec, adapter.base_fingerprint, pages, image_sha256(pages))
