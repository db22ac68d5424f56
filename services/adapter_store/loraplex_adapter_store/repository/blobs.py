"""Canonical blobs: chunks first, in one tier or several, the manifest in Valkey last (the commit point).

A crc32c is checked on every read; a chunk that one tier has lost is taken from the next.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import crc32c
from loraplex_common.adapter_image import AdapterSpec, ImageError
from loraplex_common.errors import (
    AdapterCorruptError,
    AdapterIncompatibleError,
    LoraplexError,
    SaturatedError,
    StoreUnavailableError,
)
from loraplex_common.log import get_logger
from loraplex_common.tree_digest import piece_digests, tree_root

from loraplex_adapter_store.checkpoint.canonical import CHUNK_BYTES, CanonicalForm
from loraplex_adapter_store.import_notes import ImportNotes
from loraplex_adapter_store.page_image import IMAGE
from loraplex_adapter_store.repository import keys, scripts
from loraplex_adapter_store.repository.blob_tier import BlobTier, ChunkPlace, ValkeyTier

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor

    from loraplex_adapter_store.repository.blob_tier import Chunk
    from loraplex_adapter_store.repository.bulk_reader import Arrived

_log = get_logger()
NOTES: Final = "notes"
"""Field of the manifest's hash beside `Manifest.to_fields`; stores that know of none leave it alone."""
TEXT_PARTS: Final = "text_parts"
"""Stands in a manifest's first module among its parts, though it is none that an engine computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The facts needed to read a blob.

    Attributes:
        checksums: One crc32c per chunk.
        has_text_parts: Whether the header holds text parts.
        spec: The adapter's modules, so that an image's size is known before its bytes are read.
        tree_sha256: The blob's tree digest, see `loraplex_common.tree_digest`; empty of blobs that an earlier version wrote.
        images: Field of an image (`ImageKey.field`) -> its tree digest, of those that were derived once. They are fields of the
            same hash, written by `Blobs.note_image`.
    """

    base_fingerprint: str
    num_bytes: int
    chunk_bytes: int
    checksums: tuple[int, ...]
    spec: AdapterSpec
    has_text_parts: bool = False
    tree_sha256: str = ""
    images: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_fields(self) -> dict[str, str | bytes]:
        """Encode as the fields of a Valkey hash, without those of images."""
        shape: dict[str, Any] = {"bytes": self.num_bytes, "chunk_bytes": self.chunk_bytes, "crc32c": self.checksums}
        if self.tree_sha256:
            shape["tree_sha256"] = self.tree_sha256
        spec = self.spec.to_json()
        if self.has_text_parts:  # a store that knows of none refuses the adapter by this kind's name
            marked = json.loads(spec)
            marked["modules"][0]["parts"] = {**marked["modules"][0].get("parts", {}), TEXT_PARTS: {}}
            spec = json.dumps(marked, separators=(",", ":")).encode()
        return {"blob": json.dumps(shape), "base": self.base_fingerprint, "spec": spec}

    @classmethod
    def from_fields(cls, fields: dict[bytes, bytes]) -> Manifest:
        """Decode what `to_fields` wrote."""
        shape: dict[str, Any] = json.loads(fields[b"blob"])
        spec, has_text_parts = _without_mark(fields[b"spec"])
        return cls(
            base_fingerprint=fields[b"base"].decode(),
            num_bytes=shape["bytes"],
            chunk_bytes=shape["chunk_bytes"],
            checksums=tuple(shape["crc32c"]),
            spec=_spec(spec),
            has_text_parts=has_text_parts,
            tree_sha256=shape.get("tree_sha256", ""),
            images={name.decode(): root.decode() for name, root in fields.items() if name.startswith(IMAGE.encode())},
        )


class BulkRead(NamedTuple):
    """Reads one blob, as far as it can.

    Attributes:
        read: Blocks; is given room for the blob and what to tell of arrivals, see `BulkReader.read`.
        executor: Threads that may be blocked with it.
    """

    read: Callable[[memoryview[int], Arrived], None]
    executor: Executor


@functools.lru_cache(maxsize=16)
def _spec(data: bytes) -> AdapterSpec:
    """Decode a spec: a cold image's manifest is read for its offer, and again when its bytes are."""
    return AdapterSpec.from_json(data)


def _without_mark(spec: bytes) -> tuple[bytes, bool]:
    if TEXT_PARTS.encode() not in spec:
        return spec, False
    fields = json.loads(spec)
    first = fields["modules"][0]
    del first["parts"][TEXT_PARTS]
    if not first["parts"]:
        del first["parts"]
    return json.dumps(fields, separators=(",", ":")).encode(), True


class Blobs:
    """Reads and writes canonical blobs; knows nothing of names.

    Args:
        client: Keeps the manifests.
        tiers: Keep the bytes, nearest first; by default Valkey does. Writes go to all, the farthest first.
    """

    def __init__(self, client: keys.Client, tiers: Sequence[BlobTier] = ()) -> None:
        self._client = client
        self._tiers: tuple[BlobTier, ...] = tuple(tiers) or (ValkeyTier(client),)

    async def put(self, form: CanonicalForm) -> None:
        """Write a blob; writing the same blob again is harmless.

        Raises:
            StoreUnavailableError: If Valkey or another tier cannot be reached. The part written so far is collected later.
            SaturatedError: If one is full.
        """
        checksums: list[int] = []
        pieces: list[bytes] = []
        for tier in reversed(self._tiers):
            checksums.clear()
            pieces.clear()
            await tier.write(form.revision, _noting(form.chunk_parts(), checksums, pieces))
        manifest = Manifest(
            base_fingerprint=form.base_fingerprint,
            num_bytes=form.num_bytes,
            chunk_bytes=CHUNK_BYTES,
            checksums=tuple(checksums),
            spec=form.spec,
            has_text_parts=form.text_parts.info is not None,
            tree_sha256=tree_root(pieces),
        )
        fields = manifest.to_fields()
        if form.notes is not None:
            fields[NOTES] = form.notes.to_json()
        with keys.translated():
            await self._client.hset(keys.manifest(form.revision), mapping=fields)

    async def notes(self, digest: str) -> ImportNotes | None:
        """Return what is kept of the import that stored a revision; None if nothing is."""
        with keys.translated():
            data = await self._client.hget(keys.manifest(digest), NOTES)
        return ImportNotes.from_json(data) if data else None

    async def note_again(self, digest: str, notes: ImportNotes) -> None:
        """Keep the notes of an import of a revision that was stored without any, or came unsigned and is signed now."""
        kept = await self.notes(digest)
        if kept is not None and (kept.signer or not notes.signer):
            return
        with keys.translated():
            await self._client.eval(scripts.CHANGE_FIELD, 1, keys.manifest(digest), NOTES, notes.to_json())

    async def note_image(self, digest: str, name: str, root: str) -> None:
        """Keep the tree digest of an image that was derived from checked bytes, as long as the blob is kept.

        Args:
            digest: The blob.
            name: `ImageKey.field`.
            root: The image's tree digest.

        Raises:
            StoreUnavailableError: If Valkey cannot be reached.
            SaturatedError: If it is full.
        """
        with keys.translated():
            await self._client.eval(scripts.CHANGE_FIELD, 1, keys.manifest(digest), name, root)

    async def manifest(self, digest: str) -> Manifest | None:
        """Return a blob's manifest; None if there is no such blob.

        Raises:
            AdapterIncompatibleError: If a newer version wrote it, of an adapter with parts that this one does not know.
        """
        with keys.translated():
            fields = await self._client.hgetall(keys.manifest(digest))
        try:
            return Manifest.from_fields(fields) if fields else None
        except ImageError as error:
            raise AdapterIncompatibleError(f"revision {digest}: {error}") from error

    async def is_complete(self, digest: str) -> bool:
        """Return whether the manifest exists, and the farthest tier has all chunks: what all others can be filled from."""
        manifest = await self.manifest(digest)
        return manifest is not None and await self._tiers[-1].holds(digest, len(manifest.checksums))

    async def read(self, digest: str, manifest: Manifest, start: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the blob's bytes from ``start`` on, one chunk after another, each checked.

        Raises:
            AdapterCorruptError: If no tier has a chunk undamaged. The rest of the blob is then deleted, as it is of no
                use; the next import writes the blob anew.
            StoreUnavailableError: If the only tiers that may have a chunk cannot be reached.
        """
        for number in range(start // manifest.chunk_bytes, len(manifest.checksums)):
            first = number * manifest.chunk_bytes
            place = ChunkPlace(number, first, min(first + manifest.chunk_bytes, manifest.num_bytes))
            chunk = await self._chunk(digest, place, manifest)
            yield chunk[max(0, start - first) :]

    def bulk(self, digest: str, manifest: Manifest) -> BulkRead | None:
        """Return what reads a blob's first bytes straight into memory; None if nothing does, then `read` gives all."""
        nearest = self._tiers[0]
        if not isinstance(nearest, ValkeyTier) or nearest.bulk is None:
            return None
        read = partial(nearest.bulk.reader.read, digest, manifest.chunk_bytes, manifest.checksums)
        return BulkRead(read, nearest.bulk.reader.executor)

    async def delete(self, digest: str) -> None:
        """Delete a blob, whole or partly written: the manifest first, so that no reader starts on the rest."""
        began = time.monotonic()
        with keys.translated():
            shape = await self._client.hget(keys.manifest(digest), "blob")  # the spec may be of a newer version
            await self._client.unlink(keys.manifest(digest))
        known = len(json.loads(shape)["crc32c"]) if shape else 0
        for tier in self._tiers:
            await tier.delete(digest, known)
        _log.info("blob deleted", revision=digest, seconds=round(time.monotonic() - began, 3))

    async def _chunk(self, digest: str, place: ChunkPlace, manifest: Manifest) -> bytes:
        """Return a chunk from the nearest tier that has it undamaged."""
        problems: list[str] = []
        away: LoraplexError | None = None
        for number, tier in enumerate(self._tiers):
            try:
                chunk = await tier.read(digest, place)
            except StoreUnavailableError as error:  # another tier may have it
                away = away or error
                continue
            if chunk is not None and crc32c.crc32c(chunk) == manifest.checksums[place.number]:
                await self._keep(digest, place, chunk, number)
                return chunk
            problems.append(f"{'is missing' if chunk is None else 'has a wrong crc32c'} in {tier.name}")
        if away is not None:
            raise away
        await self.delete(digest)
        raise AdapterCorruptError(
            f"revision {digest}: chunk {place.number} of {len(manifest.checksums)} {', '.join(problems)}; import the adapter again"
        )

    async def _keep(self, digest: str, place: ChunkPlace, chunk: bytes, num_nearer: int) -> None:
        """Offer a chunk to the tiers that are nearer than the one that gave it; it is read whether they take it or not."""
        for tier in self._tiers[:num_nearer]:
            try:
                await tier.keep(digest, place, chunk)
            except (StoreUnavailableError, SaturatedError) as error:
                _log.warning("a chunk is not kept nearer", revision=digest, tier=tier.name, error=error.message)


def _noting(chunks: Iterable[Chunk], checksums: list[int], pieces: list[bytes]) -> Iterator[Chunk]:
    """Pass chunks on and note the crc32c of each, and the digests of its pieces: none lies in two chunks."""
    for chunk in chunks:
        checksums.append(functools.reduce(lambda before, part: crc32c.crc32c(part, before), chunk, 0))
        pieces.append(piece_digests(*chunk))
        yield chunk
