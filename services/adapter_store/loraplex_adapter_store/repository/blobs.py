"""Canonical blobs in Valkey: chunks first, the manifest last (the commit point), a crc32c on every read."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import crc32c
from loraplex_common.adapter_image import AdapterSpec, ImageError
from loraplex_common.errors import AdapterCorruptError, AdapterIncompatibleError
from loraplex_common.log import get_logger

from loraplex_adapter_store.checkpoint.canonical import CHUNK_BYTES, CanonicalForm
from loraplex_adapter_store.import_notes import ImportNotes
from loraplex_adapter_store.repository import keys, scripts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


_log = get_logger()
_UNLINK_BATCH: Final = 64
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
    """

    base_fingerprint: str
    num_bytes: int
    chunk_bytes: int
    checksums: tuple[int, ...]
    spec: AdapterSpec
    has_text_parts: bool = False

    def to_fields(self) -> dict[str, str | bytes]:
        """Encode as the fields of a Valkey hash."""
        shape = {"bytes": self.num_bytes, "chunk_bytes": self.chunk_bytes, "crc32c": self.checksums}
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
            spec=AdapterSpec.from_json(spec),
            has_text_parts=has_text_parts,
        )


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
    """Reads and writes canonical blobs; knows nothing of names."""

    def __init__(self, client: keys.Client) -> None:
        self._client = client

    async def put(self, form: CanonicalForm) -> None:
        """Write a blob; writing the same blob again is harmless.

        Raises:
            StoreUnavailableError: If Valkey cannot be reached. The part written so far is collected later.
        """
        checksums: list[int] = []
        with keys.translated():
            for number, chunk in enumerate(form.chunks()):
                checksums.append(crc32c.crc32c(chunk))
                await self._client.set(keys.chunk(form.revision, number), chunk)
            manifest = Manifest(
                base_fingerprint=form.base_fingerprint,
                num_bytes=form.num_bytes,
                chunk_bytes=CHUNK_BYTES,
                checksums=tuple(checksums),
                spec=form.spec,
                has_text_parts=form.text_parts.info is not None,
            )
            fields = manifest.to_fields()
            if form.notes is not None:
                fields[NOTES] = form.notes.to_json()
            await self._client.hset(keys.manifest(form.revision), mapping=fields)

    async def notes(self, digest: str) -> ImportNotes | None:
        """Return what is kept of the import that stored a revision; None if nothing is."""
        with keys.translated():
            data = await self._client.hget(keys.manifest(digest), NOTES)
        return ImportNotes.from_json(data) if data else None

    async def note_if_missing(self, digest: str, notes: ImportNotes) -> None:
        """Keep an import's notes with a revision that an earlier version stored without any."""
        with keys.translated():
            await self._client.eval(scripts.ADD_FIELD, 1, keys.manifest(digest), NOTES, notes.to_json())

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
        """Return whether the manifest and all chunks exist."""
        manifest = await self.manifest(digest)
        if manifest is None:
            return False
        with keys.translated():
            count = await self._client.exists(*(keys.chunk(digest, n) for n in range(len(manifest.checksums))))
        return int(count) == len(manifest.checksums)

    async def read(self, digest: str, manifest: Manifest, start: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the blob's bytes from ``start`` on, one chunk after another, each checked.

        Raises:
            AdapterCorruptError: If a chunk is missing or damaged. The rest of the blob is then deleted, as it is of no
                use; the next import writes the blob anew.
        """
        for number in range(start // manifest.chunk_bytes, len(manifest.checksums)):
            with keys.translated():
                chunk = await self._client.get(keys.chunk(digest, number))
            if chunk is None or crc32c.crc32c(chunk) != manifest.checksums[number]:
                what = "is missing" if chunk is None else "has a wrong crc32c"
                await self.delete(digest)
                raise AdapterCorruptError(
                    f"revision {digest}: chunk {number} of {len(manifest.checksums)} {what}; import the adapter again"
                )
            yield chunk[max(0, start - number * manifest.chunk_bytes) :]

    async def delete(self, digest: str) -> None:
        """Delete a blob, whole or partly written: the manifest first, so that no reader starts on the rest."""
        began = time.monotonic()
        with keys.translated():
            shape = await self._client.hget(keys.manifest(digest), "blob")  # the spec may be of a newer version
            await self._client.unlink(keys.manifest(digest))
            known = len(json.loads(shape)["crc32c"]) if shape else 0
            first, removed = 0, 1
            while first < known or removed:  # an abandoned write has no manifest: go on until no chunk is found
                batch = [keys.chunk(digest, number) for number in range(first, first + _UNLINK_BATCH)]
                removed = await self._client.unlink(*batch)
                first += _UNLINK_BATCH
        _log.info("blob deleted", revision=digest, seconds=round(time.monotonic() - began, 3))
