"""Canonical forms read back out of Valkey: in parts of a message's size, or the text parts in their headers."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    AdapterCorruptError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
)
from loraplex_common.text_parts import TextParts

from loraplex_adapter_store.checkpoint.canonical import read_text_parts
from loraplex_adapter_store.checkpoint.canonical_header import LENGTH_BYTES, header_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from loraplex_adapter_store.repository.blobs import Blobs, Manifest
    from loraplex_adapter_store.repository.catalog import Catalog

PART_BYTES: Final = 1024 * 1024


class Downloads:
    """Reads the canonical forms of revisions."""

    def __init__(self, catalog: Catalog, blobs: Blobs) -> None:
        self._catalog = catalog
        self._blobs = blobs

    async def read(self, digest: str, offset: int, limit: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes ``[offset, offset + limit)`` of a canonical form in parts of at most `PART_BYTES`.

        Args:
            digest: The revision.
            offset: First byte.
            limit: Number of bytes; 0 for all that follow.

        Raises:
            AdapterNotFoundError: If there is no such revision.
            AdapterCorruptError: If its bytes are gone or damaged.
            InvalidParameterError: If the offset lies behind the end.
        """
        manifest = await self._manifest(digest)
        position, size = offset, manifest.num_bytes
        end = min(size, position + limit) if limit else size
        if position > size:
            raise InvalidParameterError(f"{position} lies behind the end, {size} bytes", field="offset")
        async with aclosing(self._blobs.read(digest, manifest, position)) as chunks:
            async for chunk in chunks:
                for start in range(0, len(chunk), PART_BYTES):
                    data = chunk[start : min(start + PART_BYTES, len(chunk), start + end - position)]
                    if data:
                        yield data
                    position += len(data)
                if position >= end:
                    break

    async def text_parts(self, digest: str) -> TextParts:
        """Return a revision's text parts; empty if it has none.

        Raises:
            AdapterNotFoundError: If there is no such revision.
            AdapterCorruptError: If its bytes are gone or damaged.
            AdapterIncompatibleError: If a newer version wrote a part that this one does not know.
        """
        manifest = await self._manifest(digest)
        if not manifest.has_text_parts:
            return TextParts()
        head = bytearray()
        async with aclosing(self._blobs.read(digest, manifest)) as chunks:
            async for chunk in chunks:
                head += chunk
                if len(head) >= LENGTH_BYTES and len(head) >= header_bytes(head):
                    break
        try:
            return read_text_parts(head)
        except TypeError as error:
            raise AdapterIncompatibleError(f"revision {digest}: {error}; upgrade the older side") from error

    async def _manifest(self, digest: str) -> Manifest:
        manifest = await self._blobs.manifest(digest)
        if manifest is not None:
            return manifest
        if await self._catalog.get_revisions([digest]):
            raise AdapterCorruptError(f"revision {digest}: its weights are gone from Valkey; import the adapter again")
        raise AdapterNotFoundError(f"revision {digest} does not exist")
