"""Page images: in host memory under a byte budget, on disk, or derived from canonical forms; each derived once at a time."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.adapter_image import ImageError, layout
from loraplex_common.errors import AdapterCorruptError, AdapterIncompatibleError, AdapterNotFoundError, LoraplexError
from loraplex_common.log import get_logger

from loraplex_adapter_store.derivation import Derivation
from loraplex_adapter_store.page_image import Fit, Image, ImagePlan

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loraplex_common.adapter_image import Geometry

    from loraplex_adapter_store.buffers import BufferPool
    from loraplex_adapter_store.byte_budget import ByteBudget
    from loraplex_adapter_store.derivation import PageSink
    from loraplex_adapter_store.disk.disk_tier import DiskTier
    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.page_image import ImageKey
    from loraplex_adapter_store.repository.blobs import Blobs, Manifest
    from loraplex_adapter_store.repository.catalog import Catalog
    from loraplex_adapter_store.repository.derivation_leases import DerivationLeases

_log = get_logger()


class ImageSources:
    """Where images come from that are not in memory.

    Args:
        blobs: The canonical forms.
        catalog: Tells a revision that is unknown from one whose weights are gone.
        disk: Images and canonical forms on disk; None if there is no disk tier.
        budget: Bounds what derivations hold at once.
        executor: Its threads do their work.
        leases: Say which replica derives.
        buffers: Memory of images and canonical forms.
    """

    def __init__(
        self,
        blobs: Blobs,
        catalog: Catalog,
        disk: DiskTier | None,
        budget: ByteBudget,
        executor: Executor,
        leases: DerivationLeases,
        buffers: BufferPool,
    ) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self.disk = disk
        self._budget = budget
        self._executor = executor
        self._leases = leases
        self._buffers = buffers
        self._doubted: set[str] = set()

    async def manifest(self, digest: str) -> Manifest:
        """Return the manifest of a canonical form.

        Raises:
            AdapterNotFoundError: If the revision does not exist.
            AdapterCorruptError: If its weights are gone.
            AdapterIncompatibleError: If a newer version wrote it.
            StoreUnavailableError: If Valkey cannot be reached.
        """
        manifest = await self._blobs.manifest(digest)
        if manifest is not None:
            return manifest
        if await self._catalog.get_revisions([digest]):
            raise AdapterCorruptError(f"revision {digest}: its weights are gone from Valkey; import the adapter again")
        raise AdapterNotFoundError(f"revision {digest} does not exist")

    async def planned(self, key: ImageKey, manifest: Manifest) -> ImagePlan:
        """Return what an image will be.

        Raises:
            AdapterIncompatibleError: If the adapter cannot be laid out.
        """
        run = asyncio.get_running_loop().run_in_executor
        try:
            plan = await run(self._executor, layout, key.geometry, manifest.spec.sizes)
        except ImageError as error:
            raise AdapterIncompatibleError(f"revision {key.digest}: {error}") from error
        return ImagePlan(manifest.spec, manifest.base_fingerprint, plan.num_pages)

    async def derive(self, key: ImageKey, manifest: Manifest, num_pages: int, sink: PageSink | None) -> Image:
        """Return an image that another replica derives just now, else derive it.

        Raises:
            LoraplexError: If it cannot be derived.
        """
        async with self._leases.turn(key) as turn:
            if turn.pages is None or len(turn.pages) != num_pages:
                with self._buffers.busy():
                    image = await self._derived(key, manifest, num_pages, sink)
                turn.derived = (image.pages, image.tree_sha256)
                return image
        image = Image(manifest.spec, manifest.base_fingerprint, turn.pages, turn.tree_sha256)
        if self.disk is not None:
            self.disk.keep_image(key, image)
        return image

    async def _derived(self, key: ImageKey, manifest: Manifest, num_pages: int, sink: PageSink | None) -> Image:
        """Derive an image from the canonical form on disk, else in Valkey.

        Raises:
            AdapterCorruptError: If the stored bytes do not match their digest.
            AdapterIncompatibleError: If it cannot be laid out.
            StoreUnavailableError: If the bytes are on no disk and Valkey cannot be reached.
        """
        async with self._budget.hold(manifest.num_bytes + num_pages * key.geometry.page_bytes):
            known_root = "" if key.digest in self._doubted else manifest.images.get(key.field, "")
            chunks = await self.disk.canonical(key.digest) if self.disk is not None else None
            is_on_disk = chunks is not None
            try:
                work = Derivation(key, manifest, self._executor, self._buffers, sink, known_root)
                if chunks is not None:
                    root = await work.run(lambda _: chunks)
                else:
                    rest = partial(self._blobs.read, key.digest, manifest)
                    root = await work.run(rest, self._blobs.bulk(key.digest, manifest))
            except ImageError as error:
                raise AdapterIncompatibleError(f"revision {key.digest}: {error}") from error
            work.pages.setflags(write=False)
            image = Image(manifest.spec, manifest.base_fingerprint, work.pages, root)
            if self.disk is not None:
                self.disk.keep_image(key, image)
                if not is_on_disk and not known_root:
                    self.disk.keep_canonical(key.digest, work.canonical)
            if not known_root:
                await self._note(key, root)
            return image

    def doubt(self, digest: str) -> None:
        """Hash all bytes the next time that a revision's image is derived: an engine found one damaged."""
        self._doubted.add(digest)

    async def _note(self, key: ImageKey, root: str) -> None:
        """Record what an image derived from checked bytes is, so that the next derivation need not hash."""
        self._doubted.discard(key.digest)
        try:
            await self._blobs.note_image(key.digest, key.field, root)
        except LoraplexError as error:
            _log.info("an image's digest is not recorded", revision=key.digest, error=error.message)


class ImageCache:
    """Gives out images; concurrent requests for the same image share the work.

    Args:
        budget_bytes: Bytes of images kept after their use; an image larger than that is served but not kept.
    """

    def __init__(self, sources: ImageSources, metrics: StoreMetrics, *, budget_bytes: int) -> None:
        self._sources = sources
        self._metrics = metrics
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[ImageKey, Image] = OrderedDict()  # least recently used first
        self._kept_bytes = 0
        self._building: dict[ImageKey, asyncio.Task[Image]] = {}

    async def plan(self, key: ImageKey, fit: Fit) -> ImagePlan:
        """Return what an engine's image is or will be; an image in memory or on disk needs no Valkey.

        Raises:
            LoraplexError: In the cases of `get`, as far as they are known before the image is derived.
        """
        image = self._kept.get(key) or await self._on_disk(key)
        if image is not None:
            plan = image.plan
        else:
            manifest = await self._sources.manifest(key.digest)
            fit.check_base(key.digest, manifest.base_fingerprint)
            plan = await self._sources.planned(key, manifest)
        fit.check(key, plan)
        return plan

    async def get(self, key: ImageKey, fit: Fit, sink: PageSink | None = None) -> Image:
        """Return an image that fits an engine.

        Args:
            key: What the image depends on.
            fit: What the engine can take.
            sink: If the image has to be derived, and this call is the first to ask for it, is given each page as soon as
                it is finished. If this raises, and so if it is cancelled, the work may go on for others, and so may that.

        Raises:
            AdapterNotFoundError: If the revision does not exist.
            AdapterIncompatibleError: If it is for another base model, too large, or cannot be laid out.
            AdapterCorruptError: If the stored bytes do not match their digest.
            StoreUnavailableError: If it is neither in memory nor on disk and Valkey cannot be reached.
        """
        began = time.monotonic()
        image, tier = self._kept.get(key), "host"
        if image is not None:
            self._kept.move_to_end(key)
        elif (image := await self._on_disk(key)) is not None:
            tier = "disk"
        else:
            image, tier = await self._build_once(key, fit, sink), "redis"
        fit.check(key, image.plan)
        self._metrics.fetches.labels(tier).inc()
        self._metrics.fetch_bytes.labels(tier).inc(image.pages.nbytes)
        self._metrics.fetch_seconds.labels(tier).observe(time.monotonic() - began)
        return image

    async def prepare(self, key: ImageKey, base_fingerprint: str) -> None:
        """Derive an image that no engine wants yet, if there is room for it that no other image has.

        Raises:
            LoraplexError: In the cases of `get`.
        """
        fit = Fit(base_fingerprint, max_pages=sys.maxsize)
        if key in self._kept or key in self._building or await self._on_disk(key) is not None:
            return
        num_bytes = (await self.plan(key, fit)).num_pages * key.geometry.page_bytes
        if self._sources.disk is not None or self._kept_bytes + num_bytes <= self._budget_bytes:
            await self._build_once(key, fit, None, may_displace=False)

    def drop(self, digest: str, *, is_damaged: bool = False) -> None:
        """Forget all images of a revision, on disk too; if one was damaged, trust no recorded digest before all is hashed anew."""
        if is_damaged:
            self._sources.doubt(digest)
        for key in [key for key in self._kept if key.digest == digest]:
            self._kept_bytes -= self._kept.pop(key).pages.nbytes
        self._metrics.image_cache_bytes.set(self._kept_bytes)
        if self._sources.disk is not None:
            self._sources.disk.drop(digest)

    def recent(self, geometry: Geometry) -> dict[str, int]:
        """Return the digests whose images of a geometry are at hand with their pages, most recently used first.

        Those in memory come before those on disk.
        """
        found: dict[str, int] = {}
        for key, image in reversed(self._kept.items()):
            if key.geometry == geometry:
                found[key.digest] = max(len(image.pages), found.get(key.digest, 0))
        if self._sources.disk is not None:
            found |= {each: pages for each, pages in self._sources.disk.recent(geometry).items() if each not in found}
        return found

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if the accounting and the images kept disagree."""
        total = sum(image.pages.nbytes for image in self._kept.values())
        if total != self._kept_bytes or total > self._budget_bytes:
            raise RuntimeError(
                f"image cache: {total} bytes kept, {self._kept_bytes} counted, budget {self._budget_bytes}"
            )

    async def _on_disk(self, key: ImageKey) -> Image | None:
        return await self._sources.disk.image(key) if self._sources.disk is not None else None

    async def _build_once(self, key: ImageKey, fit: Fit, sink: PageSink | None, *, may_displace: bool = True) -> Image:
        task = self._building.get(key)
        if task is None:
            task = asyncio.create_task(self._build(key, fit, sink, may_displace), name=f"image {key.digest[:12]}")
            self._building[key] = task
            task.add_done_callback(partial(self._built, key))
        return await asyncio.shield(task)  # other callers may wait for it even if this one goes away

    def _built(self, key: ImageKey, task: asyncio.Task[Image]) -> None:
        self._building.pop(key, None)
        if not task.cancelled():
            task.exception()  # its callers have it, if any is left

    async def _build(self, key: ImageKey, fit: Fit, sink: PageSink | None, may_displace: bool) -> Image:
        manifest = await self._sources.manifest(key.digest)
        plan = await self._sources.planned(key, manifest)
        fit.check(key, plan)
        try:
            image = await self._sources.derive(key, manifest, plan.num_pages, sink)
        except AdapterCorruptError:
            self._metrics.verify_failures.inc()
            raise
        if may_displace or self._kept_bytes + image.pages.nbytes <= self._budget_bytes:
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
