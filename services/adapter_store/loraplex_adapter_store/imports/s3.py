"""Import from object storage: a folder of a bucket that the operator allows, straight into memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import obstore
from loraplex_common.adapter_folder import MAX_DEPTH, MAX_LISTED, check_present_signed
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)

from loraplex_adapter_store.imports.files import CheckpointFiles, check_size, from_contents
from loraplex_adapter_store.imports.pace import Pace
from loraplex_adapter_store.object_storage import (
    SCHEME,
    Bucket,
    CredentialRefusedError,
    checked_location,
    storage_errors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obstore.store import S3Store

    from loraplex_adapter_store.credentials import Credentials
    from loraplex_adapter_store.imports.threads import DownloadThreads

CHUNK_BYTES: Final = 1024 * 1024
ATTEMPTS: Final = 5
"""Connections in a row that may break while an object is read before its import is given up."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Source:
    """A folder of a bucket.

    Attributes:
        bucket: The part of a bucket that the operator allows, which the folder is in.
        folder: The folder; empty for the bucket's root.
    """

    bucket: Bucket
    folder: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.bucket.name}" + (f"/{self.folder}" if self.folder else "")


@dataclass(frozen=True, slots=True)
class _Object:
    path: str
    num_bytes: int
    tag: str | None


class S3Imports:
    """Downloads checkpoints from object storage.

    Args:
        buckets: What may be read; none means that such imports are off.
        credentials: Keys by name.
        threads: Where downloads run.
        reads_signature: Tells whether signatures are wanted.
    """

    def __init__(
        self,
        buckets: tuple[Bucket, ...],
        credentials: Credentials,
        threads: DownloadThreads,
        reads_signature: Callable[[], bool] = lambda: False,
    ) -> None:
        self._reads_signature = reads_signature
        self._buckets = buckets
        self._credentials = credentials
        self._threads = threads

    def locate(self, uri: str) -> S3Source:
        """Return the folder that ``s3://bucket/folder`` means.

        Raises:
            InvalidParameterError: If it is no such URI, or in no bucket that the operator allows.
        """
        try:
            parts = urlsplit(uri)
            if parts.query or parts.fragment:
                raise ValueError("neither ? nor # belongs there: the operator names endpoint and region")
            name, folder = checked_location(parts.netloc, parts.path.strip("/"))
        except ValueError as error:
            raise InvalidParameterError(
                f"{uri[:200]!r} is not of the form s3://bucket/folder: {error}", field="uri"
            ) from error
        for bucket in self._buckets:
            if bucket.holds(name, folder):
                return S3Source(bucket=bucket, folder=folder)
        raise InvalidParameterError(
            f"{uri[:200]!r} is in no bucket that this store imports from (--import-bucket)", field="uri"
        )

    async def fetch(
        self, source: S3Source, credential: str, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        """Call `read` in a thread, once one is free."""
        return await self._threads.run(partial(self.read, source, credential, max_adapter_bytes, take))

    def read(
        self, source: S3Source, credential: str, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        """Download a checkpoint; blocks.

        Args:
            source: The folder.
            credential: Name of the credential; empty for the bucket's own, and without one unsigned requests.
            max_adapter_bytes: Most bytes of the weights; enforced, whatever size the storage announced.
            take: Waits for memory for that many more bytes.

        Raises:
            InvalidParameterError: If the credential is unknown or of another kind.
            AdapterNotFoundError: If there is no such bucket, or nothing in the folder.
            AdapterForbiddenError: If the credential has expired or may not read it.
            AdapterCorruptUploadError: If a file is missing, too large or changed meanwhile.
            AdapterIncompatibleError: If the folder is not a PEFT adapter.
            DeadlineError: If the storage sends too slowly.
            SaturatedError: If there is no memory for the bytes.
            StoreUnavailableError: If the storage cannot be reached, or stays too busy.
        """
        reader = _Reader(source, credential or source.bucket.credential, self._credentials)
        listed = reader.list()
        names = check_present_signed(listed, signature=self._reads_signature())
        for name in names:
            check_size(name, listed[name].num_bytes, max_adapter_bytes)
        contents: dict[str, bytes | bytearray] = {name: reader.read(listed[name], take) for name in names}
        return from_contents(contents, str(source))


class _Reader:
    """Reads one folder. A credential that is refused is read again from its file, once."""

    def __init__(self, source: S3Source, credential: str, credentials: Credentials) -> None:
        self._source = source
        self._credentials = credentials
        self._credential = credentials.get(credential)
        self._store = self._open()
        self._is_renewed = False

    def list(self) -> dict[str, _Object]:
        """Return the folder's objects by their names below it, as far as `check_present` looks.

        Raises:
            LoraplexError: In the cases of `S3Imports.read`.
        """
        found = self._with_credential(self._list)
        if not found:
            raise AdapterNotFoundError(f"{self._source}: nothing lies there")
        return found

    def read(self, item: _Object, take: Callable[[int], None]) -> bytearray:
        """Return an object's bytes. A connection that breaks is made again, and the rest requested.

        Raises:
            LoraplexError: In the cases of `S3Imports.read`.
        """
        what, data = self._name_of(item), bytearray()
        pace, num_left = Pace(what), ATTEMPTS
        while len(data) < item.num_bytes:
            before = len(data)
            try:
                self._with_credential(lambda: self._continue(item, data, pace, take))
            except StoreUnavailableError:
                # Without a byte the request itself was sent again for `RETRY_S` already.
                num_left -= len(data) - before < CHUNK_BYTES
                if not num_left or len(data) == before:
                    raise
            else:
                if len(data) == before:
                    raise AdapterCorruptUploadError(
                        f"{what}: {len(data)} bytes have come of {item.num_bytes} announced"
                    )
        return data

    def _name_of(self, item: _Object) -> str:
        return f"{self._source}: {item.path.rpartition('/')[2]}"

    def _list(self) -> dict[str, _Object]:
        found: dict[str, _Object] = {}
        folder = self._source.folder
        with storage_errors(str(self._source)):
            for page in obstore.list(self._store, folder or None):
                for meta in page:
                    name = meta["path"].removeprefix(folder).lstrip("/")
                    if name and name.count("/") <= MAX_DEPTH:
                        found[name] = _Object(meta["path"], meta["size"], meta["e_tag"])
                if len(found) > MAX_LISTED:
                    raise AdapterCorruptUploadError(
                        f"{self._source}: more than {MAX_LISTED} objects; import the folder of one adapter"
                    )
        return found

    def _continue(self, item: _Object, data: bytearray, pace: Pace, take: Callable[[int], None]) -> None:
        """Read on from where the data ends, as far as the connection goes."""
        options: dict[str, Any] = {"range": {"offset": len(data)}} if data else {}
        if item.tag is not None:
            options["if_match"] = item.tag
        with storage_errors(self._name_of(item)):
            chunks = iter(obstore.get(self._store, item.path, options=options).stream(min_chunk_size=CHUNK_BYTES))  # type: ignore[arg-type]
            for chunk in _timed(chunks, pace):
                if len(data) + len(chunk) > item.num_bytes:
                    raise AdapterCorruptUploadError(
                        f"{self._name_of(item)}: more than the {item.num_bytes} bytes that the storage announced"
                    )
                take(len(chunk))
                data += chunk

    def _with_credential(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except CredentialRefusedError as error:
            if self._is_renewed or self._credential is None:
                raise
            self._is_renewed = True
            renewed = self._credentials.get_now(self._credential.name)
            if renewed == self._credential:
                raise CredentialRefusedError(f"{error.message} (line {self._credential.name!r})") from error
            self._credential = renewed
            self._store = self._open()
            return work()

    def _open(self) -> S3Store:
        try:
            return self._source.bucket.open(self._credential, is_anonymous=True)
        except ValueError as error:
            raise StoreUnavailableError(str(error)) from error


def _timed(chunks: Iterator[Any], pace: Pace) -> Iterator[Any]:
    while True:
        began_s = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        pace.came(len(chunk), time.monotonic() - began_s)
        yield chunk
