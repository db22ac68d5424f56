"""Canonical blobs in object storage: one object each, named by its digest. The farthest tier, and the only whole copy."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import TYPE_CHECKING, Final

import obstore
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.log import get_logger
from obstore import exceptions

from loraplex_adapter_store.object_storage import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from obstore.store import S3Store

    from loraplex_adapter_store.credentials import Credential, Credentials
    from loraplex_adapter_store.object_storage import Bucket
    from loraplex_adapter_store.repository.blob_tier import Chunk, ChunkPlace

_log = get_logger()
RETRY_AFTER_S: Final = 10.0
PART_BYTES: Final = 8 * 1024 * 1024
"""Largest blob that is written in one request, and the size of a larger one's parts."""
ABSENT: Final = "NoSuchKey"


class ObjectTier:
    """A `BlobTier` in a folder of a bucket. An object appears whole or not at all.

    Args:
        bucket: The folder, and the name of its credential.
        credentials: Keys by name; a changed line counts from the next call on.

    Raises:
        InvalidParameterError: If the credential is unknown or of another kind.
        ValueError: If the storage cannot be used so.
    """

    name: str = "object storage"

    def __init__(self, bucket: Bucket, credentials: Credentials) -> None:
        self._bucket = bucket
        self._credentials = credentials
        self._credential: Credential | None = credentials.get(bucket.credential)
        self._store: S3Store = bucket.open(self._credential)

    @property
    def place(self) -> str:
        """Where the blobs lie, for people."""
        return str(self._bucket)

    async def write(self, digest: str, chunks: Iterable[Chunk]) -> None:
        """See `BlobTier`."""
        rest = map(b"".join, chunks)
        first: list[bytes] = []
        while sum(map(len, first)) <= PART_BYTES and (chunk := next(rest, None)) is not None:
            first.append(chunk)
        is_small = sum(map(len, first)) <= PART_BYTES
        data = b"".join(first) if is_small else chain(first, rest)
        with self._errors(f"write revision {digest}"):
            # In parts, three requests and more, it appears with the last of them.
            await obstore.put_async(
                self._client(), self.path(digest), data, use_multipart=not is_small, chunk_size=PART_BYTES
            )

    async def read(self, digest: str, place: ChunkPlace) -> bytes | None:
        """See `BlobTier`. That the bucket is gone is no answer: a blob is only missing if the storage says so of it."""
        try:
            with self._errors(f"read revision {digest}"):
                data = await obstore.get_range_async(
                    self._client(), self.path(digest), start=place.start, end=place.stop
                )
        except FileNotFoundError:
            return None
        return bytes(data)

    async def holds(self, digest: str, num_chunks: int) -> bool:
        """See `BlobTier`."""
        try:
            with self._errors(f"look for revision {digest}"):
                # Not HEAD, whose answer has no body: it would not tell a missing object from a missing bucket.
                await obstore.get_range_async(self._client(), self.path(digest), start=0, end=1)
        except FileNotFoundError:
            return False
        return True

    async def keep(self, digest: str, place: ChunkPlace, chunk: bytes) -> None:
        """See `BlobTier`: whole objects only."""

    async def delete(self, digest: str, num_chunks: int) -> None:
        """See `BlobTier`."""
        with self._errors(f"delete revision {digest}"), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._client(), self.path(digest))

    def path(self, digest: str) -> str:
        """Return the name of a blob's object."""
        folder = f"{self._bucket.prefix}/" if self._bucket.prefix else ""
        return f"{folder}blobs/{digest[:2]}/{digest}"

    def _client(self) -> S3Store:
        credential = self._credentials.get(self._bucket.credential)
        if credential != self._credential:
            self._credential, self._store = credential, self._bucket.open(credential)
            _log.info("the cold tier's credential was read again", bucket=str(self._bucket))
        return self._store

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn failures into errors of the contract; `FileNotFoundError` for an object that is not there."""
        try:
            yield
        except (exceptions.BaseError, FileNotFoundError) as error:
            said = answer_of(error)
            if isinstance(error, FileNotFoundError) and said == ABSENT:
                raise
            _log.error("the cold tier fails", bucket=str(self._bucket), what=what, answer=str(error)[:500])
            raise StoreUnavailableError(
                f"the adapter store's object storage cannot {what}: it answers with {said}", retry_after_s=RETRY_AFTER_S
            ) from error
