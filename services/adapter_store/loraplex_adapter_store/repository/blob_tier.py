"""Where the bytes of canonical blobs lie: one or several tiers behind each other, the first being the nearest.

A tier knows digests and positions, and nothing of names, manifests or checksums: `Blobs` checks every chunk that a tier
gives, and asks the next tier if it is missing or damaged.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.bulk_writer import BulkWriter, Unwritten
from loraplex_adapter_store.thread_work import ThreadWork

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from loraplex_adapter_store.repository.bulk_reader import BulkReader

Chunk: TypeAlias = Sequence[memoryview]
"""The bytes of a chunk as the views that it consists of, in order: so that nothing is copied before it is sent."""

_UNLINK_BATCH: Final = 64


class ChunkPlace(NamedTuple):
    """A chunk of a blob, for tiers that keep chunks by number and for those that keep whole blobs and read ranges.

    Attributes:
        number: Counted from 0.
        start: First byte in the blob.
        stop: The byte behind the last.
    """

    number: int
    start: int
    stop: int


class BlobTier(Protocol):
    """Keeps blobs by digest.

    Attributes:
        name: For logs, messages and metrics, such as ``redis``.
    """

    name: str

    async def write(self, digest: str, chunks: Iterable[Chunk]) -> None:
        """Write a blob whose chunks come in order; when it returns, the blob is as durable as the tier makes it.

        Writing the same blob again is harmless. A write that ends early leaves nothing that `holds` takes for a blob.

        Raises:
            StoreUnavailableError: If the tier cannot be reached.
            SaturatedError: If the tier is full.
        """
        ...

    async def read(self, digest: str, place: ChunkPlace) -> bytes | None:
        """Return the bytes of one chunk; None if the tier does not have them.

        Raises:
            StoreUnavailableError: If the tier cannot be reached.
        """
        ...

    async def keep(self, digest: str, place: ChunkPlace, chunk: bytes) -> None:
        """Take a chunk that a farther tier has given, if this tier keeps copies of what is read.

        Raises:
            StoreUnavailableError: If the tier cannot be reached.
            SaturatedError: If the tier is full.
        """
        ...

    async def holds(self, digest: str, num_chunks: int) -> bool:
        """Return whether all chunks of a blob are there.

        Raises:
            StoreUnavailableError: If the tier cannot be reached.
        """
        ...

    async def delete(self, digest: str, num_chunks: int) -> None:
        """Delete a blob, whole or partly written; deleting one that is not there is harmless.

        Args:
            digest: The blob.
            num_chunks: Chunks that its manifest counts; 0 if it has none, so that it may have any number.

        Raises:
            StoreUnavailableError: If the tier cannot be reached.
        """
        ...


class Bulk(NamedTuple):
    """What moves whole blobs between Valkey and memory, in threads."""

    reader: BulkReader
    writer: BulkWriter

    def close(self) -> None:
        """End the threads and connections of both; waits for what is under way."""
        self.reader.close()
        self.writer.close()


class ValkeyTier:
    """Keeps each chunk as a value of Valkey, in the append-only file with all else there.

    Attributes:
        bulk: Moves whole blobs faster; None where nothing can.
    """

    name: str = "redis"

    def __init__(self, client: keys.Client, bulk: Bulk | None = None) -> None:
        self._client = client
        self.bulk = bulk

    async def write(self, digest: str, chunks: Iterable[Chunk]) -> None:
        """See `BlobTier`."""
        left = Unwritten(chunks)
        if self.bulk is not None:
            await _write_bulk(self.bulk.writer, digest, left)
        number = left.num_stored
        async with aclosing(_made_ahead(map(b"".join, left))) as ready:
            async for chunk in ready:
                with keys.translated():
                    await self._client.set(keys.chunk(digest, number), chunk)
                number += 1

    async def read(self, digest: str, place: ChunkPlace) -> bytes | None:
        """See `BlobTier`."""
        with keys.translated():
            chunk: bytes | None = await self._client.get(keys.chunk(digest, place.number))
        return chunk

    async def keep(self, digest: str, place: ChunkPlace, chunk: bytes) -> None:
        """See `BlobTier`: a copy without a bound is none of this tier's."""

    async def holds(self, digest: str, num_chunks: int) -> bool:
        """See `BlobTier`."""
        with keys.translated():
            count = await self._client.exists(*(keys.chunk(digest, number) for number in range(num_chunks)))
        return int(count) == num_chunks

    async def delete(self, digest: str, num_chunks: int) -> None:
        """See `BlobTier`."""
        first, removed = 0, 1
        while first < num_chunks or removed:  # an abandoned write has no manifest: go on until no chunk is found
            batch = [keys.chunk(digest, number) for number in range(first, first + _UNLINK_BATCH)]
            with keys.translated():
                removed = await self._client.unlink(*batch)
            first += _UNLINK_BATCH


async def _write_bulk(writer: BulkWriter, digest: str, left: Unwritten) -> None:
    """Let a thread write what it can; when this ends, also if it is cancelled, it writes no more."""
    work, is_stopped = ThreadWork(writer.executor), threading.Event()
    try:
        work.start(writer.write, digest, left, is_stopped.is_set)
        await work.done()
    finally:
        is_stopped.set()
        await work.quiet()


async def _made_ahead(chunks: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield chunks that a thread makes, each while the one before is being written."""
    iterator = iter(chunks)
    following = asyncio.ensure_future(asyncio.to_thread(next, iterator, b""))
    try:
        while chunk := await following:
            following = asyncio.ensure_future(asyncio.to_thread(next, iterator, b""))
            yield chunk
    finally:
        await asyncio.wait({following})
