"""Where checkpoints are fetched from: directories of this machine, the hub, object storage and registries."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.errors import InvalidParameterError

from loraplex_adapter_store import object_storage
from loraplex_adapter_store.imports import oci
from loraplex_adapter_store.imports.directory import ImportRoots
from loraplex_adapter_store.imports.hub import Hub, HubSource
from loraplex_adapter_store.imports.s3 import S3Imports
from loraplex_adapter_store.imports.threads import DownloadThreads

if TYPE_CHECKING:
    from loraplex_adapter_store.config import StoreConfig
    from loraplex_adapter_store.credentials import Credentials
    from loraplex_adapter_store.imports.importer import Fetch
    from loraplex_adapter_store.signatures.check import Signatures


class Sources:
    """Finds out how a source is fetched.

    Args:
        config: What the operator allows.
        credentials: What private sources want, by name.
        signatures: Tells of which sources a signature is wanted.
    """

    def __init__(self, config: StoreConfig, credentials: Credentials, signatures: Signatures) -> None:
        self._threads = DownloadThreads()
        self._roots = ImportRoots(config.import_root, partial(signatures.reads, "dir"))
        self._hub = Hub(config.hf_endpoint, self._threads, partial(signatures.reads, "hf"))
        self._buckets = S3Imports(config.import_bucket, credentials, self._threads, partial(signatures.reads, "s3"))
        self._registries = oci.OciImports(
            config.import_registry, credentials, self._threads, partial(signatures.reads, "oci")
        )
        self._credentials = credentials
        self._signatures = signatures
        self._max_adapter_bytes = config.max_adapter_bytes

    async def close(self) -> None:
        """Start no further downloads and wait for those that run; they end as soon as they ask for room."""
        await self._threads.close()
        self._registries.close()

    def wants_signature(self, source: str) -> bool:
        """Return whether the signature of what a source holds is looked at."""
        return self._signatures.reads(source.partition(":")[0])

    async def pin(self, source: HubSource, credential: str) -> HubSource:
        """Return a repository of the hub at the commit where its default branch is, unless it has one.

        Raises:
            InvalidParameterError: If the credential is unknown.
            LoraplexError: If the hub refuses, or cannot be reached.
        """
        found = self._credentials.get(credential)
        return await self._hub.pin(source, None if found is None else found.token)

    def fetcher(self, source: str | HubSource, credential: str) -> tuple[str, Fetch]:
        """Return the identity of a source, which is equal for equal ones, and what fetches it.

        Args:
            source: A ``file:``, ``s3:`` or ``oci:`` URI, or a repository of the hub.
            credential: Name of the credential; may be empty.

        Raises:
            InvalidParameterError: If the source is malformed or none that the operator allows, or the credential is
                unknown.
        """
        if isinstance(source, str):
            return self._by_uri(source, credential)
        source.check()
        found = self._credentials.get(credential)
        token = None if found is None else found.token
        # Not shared between credentials: one may see what the other may not.
        return f"{source}#{credential}", partial(self._hub.fetch, source, token, self._max_adapter_bytes)

    def _by_uri(self, uri: str, credential: str) -> tuple[str, Fetch]:
        scheme, mark, _ = uri.partition("://")
        if mark and scheme in (object_storage.SCHEME, oci.SCHEME):
            self._credentials.get(credential)  # refuse at once what can be refused at once
        if mark and scheme == object_storage.SCHEME:
            folder = self._buckets.locate(uri)
            fetch = partial(self._buckets.fetch, folder, credential, self._max_adapter_bytes)
            return f"{folder}#{credential}", fetch
        if mark and scheme == oci.SCHEME:
            manifest = self._registries.locate(uri)
            return f"{manifest}#{credential}", partial(
                self._registries.fetch, manifest, credential, self._max_adapter_bytes
            )
        if credential:
            raise InvalidParameterError("a directory needs no credential", field="credential_ref")
        self._roots.locate(uri)
        return uri, partial(self._roots.fetch, uri, self._max_adapter_bytes)
