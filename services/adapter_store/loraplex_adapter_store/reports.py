"""What a revision is made of, measured from its canonical form in a thread of its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from loraplex_common.adapter_image import ImageError, layout
from loraplex_common.errors import (
    AdapterCorruptError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    SaturatedError,
)

from loraplex_adapter_store.attach.attached import WeightNorms
from loraplex_adapter_store.import_notes import ImportNotes
from loraplex_adapter_store.measures import AdapterMeasure, measure
from loraplex_adapter_store.records import Revision

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry

    from loraplex_adapter_store.attach.attached import AttachedEngines
    from loraplex_adapter_store.records import AdapterRecord
    from loraplex_adapter_store.repository.blobs import Blobs

MAX_WAITING: Final = 16
"""Reports that may wait for their turn; only one is measured at a time."""
MAX_KEPT: Final = 64
"""Measured revisions that are kept: a revision never changes."""
RETRY_AFTER_S: Final = 5.0


class ImageSize(NamedTuple):
    """An adapter as the engines of one geometry hold it.

    Attributes:
        problem: Why it cannot be laid out; empty if it can.
    """

    geometry: Geometry
    num_pages: int
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """See the contract's ``AdapterReport``.

    Attributes:
        notes: None if the revision was stored before imports were recorded.
        norms: Norms of the base's weights; empty if no engine has reported them.
    """

    name: str
    revision: Revision
    measured: AdapterMeasure
    notes: ImportNotes | None
    norms: WeightNorms
    images: tuple[ImageSize, ...]


class Reports:
    """Makes reports, one at a time."""

    def __init__(self, blobs: Blobs, attached: AttachedEngines) -> None:
        self._blobs = blobs
        self._attached = attached
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._kept: OrderedDict[str, AdapterMeasure] = OrderedDict()  # least recently used first

    async def of(self, record: AdapterRecord, revision: Revision | None) -> Report:
        """Return the report on a revision of an adapter.

        Raises:
            AdapterNotFoundError: If the name means no revision yet.
            AdapterCorruptError: If the stored bytes are gone or damaged.
            AdapterIncompatibleError: If a newer version wrote a part that this one does not know.
            SaturatedError: If too many reports wait.
        """
        if revision is None:
            raise AdapterNotFoundError(f"adapter {record.name} has no revision yet: import one first")
        digest, base = revision.revision, revision.base_fingerprint
        notes = await self._blobs.notes(digest)
        measured = await self._measured(digest)
        geometries = self._attached.geometries(base)
        images = await asyncio.get_running_loop().run_in_executor(
            self._executor, _image_sizes, measured.spec, geometries
        )
        return Report(
            name=record.name,
            revision=revision,
            measured=measured,
            notes=notes,
            norms=self._attached.weight_norms(base),
            images=images,
        )

    def close(self) -> None:
        """Wait for the thread."""
        self._executor.shutdown(cancel_futures=True)

    async def _measured(self, digest: str) -> AdapterMeasure:
        if (known := self._known(digest)) is not None:
            return known
        if self._num_waiting >= MAX_WAITING:
            raise SaturatedError(f"{MAX_WAITING} reports are being made", retry_after_s=RETRY_AFTER_S)
        self._num_waiting += 1
        try:
            async with self._turn:
                if (known := self._known(digest)) is not None:  # another caller asked for it meanwhile
                    return known
                found = await self._measure(digest)
        finally:
            self._num_waiting -= 1
        self._kept[digest] = found
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return found

    def _known(self, digest: str) -> AdapterMeasure | None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    async def _measure(self, digest: str) -> AdapterMeasure:
        manifest = await self._blobs.manifest(digest)
        if manifest is None:
            raise AdapterCorruptError(f"revision {digest}: its weights are gone from Valkey; import the adapter again")
        data = bytearray()
        async for chunk in self._blobs.read(digest, manifest):
            data += chunk
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, measure, data, digest)
        except TypeError as error:
            raise AdapterIncompatibleError(f"revision {digest}: {error}; upgrade the older side") from error


def _image_sizes(spec: AdapterSpec, geometries: tuple[Geometry, ...]) -> tuple[ImageSize, ...]:
    return tuple(_image_size(spec, each) for each in geometries)


def _image_size(spec: AdapterSpec, geometry: Geometry) -> ImageSize:
    try:
        return ImageSize(geometry, layout(geometry, spec.sizes).num_pages)
    except ImageError as error:
        return ImageSize(geometry, 0, str(error))
