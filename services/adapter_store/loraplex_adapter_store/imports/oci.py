"""Import from a registry of the OCI distribution protocol: the layers of one manifest, named by its digest."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx2
from loraplex_common.adapter_folder import check_present_signed
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    InvalidParameterError,
    StoreUnavailableError,
)

from loraplex_adapter_store.checkpoint.bounds import MAX_LISTING_VALUES, parse_json
from loraplex_adapter_store.imports.files import CheckpointFiles, check_size, from_contents, limit_of
from loraplex_adapter_store.imports.registry import Registry, RegistrySession

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_adapter_store.credentials import Credentials
    from loraplex_adapter_store.imports.threads import DownloadThreads

SCHEME: Final = "oci"
MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""What the distribution protocol lets a registry refuse above."""
MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
"""Asked for as well, only to say what such a digest is: some registries hide what is not asked for."""
NAME_ANNOTATIONS: Final = ("org.opencontainers.image.title", "org.cncf.model.filepath")
"""Annotations of a layer that hold its file's name: ORAS's, and ModelPack's."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_URI: Final = re.compile(
    r"oci://(?P<host>[A-Za-z0-9.-]+(:\d{1,5})?)/"
    r"(?P<repo>[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)(@(?P<digest>[^@]*))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OciSource:
    """A manifest in a repository of a registry."""

    registry: Registry
    repo: str
    digest: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.registry.host}/{self.repo}@{self.digest}"


@dataclass(frozen=True, slots=True)
class _Layer:
    digest: str
    num_bytes: int


class OciImports:
    """Downloads checkpoints from registries.

    Args:
        registries: Those that may be read from; none means that such imports are off.
        credentials: Logins and tokens by name.
        threads: Where downloads run.
        reads_signature: Tells whether signatures are wanted.
    """

    def __init__(
        self,
        registries: tuple[Registry, ...],
        credentials: Credentials,
        threads: DownloadThreads,
        reads_signature: Callable[[], bool] = lambda: False,
    ) -> None:
        self._reads_signature = reads_signature
        self._registries = {registry.host: registry for registry in registries}
        self._credentials = credentials
        self._threads = threads
        self._client = httpx2.Client()

    def locate(self, uri: str) -> OciSource:
        """Return the manifest that ``oci://registry/repository@sha256:...`` means.

        Raises:
            InvalidParameterError: If it is no such URI, or of no registry that the operator allows.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise InvalidParameterError(
                f"{uri[:200]!r} is not of the form oci://registry/repository@sha256:...", field="uri"
            )
        if _DIGEST.fullmatch(match["digest"] or "") is None:
            raise InvalidParameterError(
                f"{uri[:200]!r} has no digest (@sha256: and 64 lower-case hex digits), because tags move", field="uri"
            )
        registry = self._registries.get(match["host"])
        if registry is None:
            raise InvalidParameterError(
                f"{uri[:200]!r} is of no registry that this store imports from (--import-registry)", field="uri"
            )
        return OciSource(registry=registry, repo=match["repo"], digest=match["digest"])

    async def fetch(
        self, source: OciSource, credential: str, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        """Call `read` in a thread, once one is free."""
        return await self._threads.run(partial(self.read, source, credential, max_adapter_bytes, take))

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def read(
        self, source: OciSource, credential: str, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        """Download a checkpoint; blocks.

        Args:
            source: The manifest.
            credential: Name of the credential; empty for the registry's own, if it has one.
            max_adapter_bytes: Most bytes of the weights; enforced, whatever size the manifest says.
            take: Waits for memory for that many more bytes.

        Raises:
            InvalidParameterError: If the credential is unknown or of another kind.
            AdapterNotFoundError: If there is no such manifest or layer.
            AdapterForbiddenError: If the registry refuses the credential.
            AdapterCorruptUploadError: If a file is missing or too large, or bytes do not have their digest.
            AdapterIncompatibleError: If the manifest is no single PEFT adapter's.
            DeadlineError: If the registry sends too slowly.
            SaturatedError: If there is no memory for the bytes.
            StoreUnavailableError: If the registry cannot be reached, or stays too busy.
        """
        session = RegistrySession(self._client, source.registry, source.repo, credential, self._credentials)
        try:
            return self._read(session, source, max_adapter_bytes, take)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise StoreUnavailableError(
                f"{source}: cannot be downloaded: {type(error).__name__}", retry_after_s=10.0
            ) from error

    def _read(
        self, session: RegistrySession, source: OciSource, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        accept = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
        # The manifest is dropped before anything else is read, so it takes none of the imports' room.
        manifest = session.read(
            f"manifests/{source.digest}",
            accept=accept,
            limit=MAX_MANIFEST_BYTES,
            take=lambda _: None,
            what=f"{source}: the manifest",
        )
        _check_digest(manifest, source.digest, f"{source}: the manifest")
        layers = _layers(bytes(manifest), source)
        names = check_present_signed(layers, signature=self._reads_signature())
        for name in names:
            check_size(name, layers[name].num_bytes, max_adapter_bytes)
        contents: dict[str, bytes | bytearray] = {}
        for name in names:
            what = f"{source}: {name}"
            contents[name] = session.read(
                f"blobs/{layers[name].digest}", limit=limit_of(name, max_adapter_bytes), take=take, what=what
            )
            _check_digest(contents[name], layers[name].digest, what)
        return from_contents(contents, str(source))


def _check_digest(data: bytes | bytearray, digest: str, what: str) -> None:
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != digest:
        raise AdapterCorruptUploadError(f"{what}: its bytes have digest {found}, not {digest}")


def _layers(manifest: bytes, source: OciSource) -> dict[str, _Layer]:
    """Return a manifest's layers by the names of their files.

    Raises:
        AdapterCorruptUploadError: If it is no manifest.
        AdapterIncompatibleError: If it is an index of manifests, or its layers are archives.
    """
    found: dict[str, _Layer] = {}
    archives: list[str] = []
    try:
        fields = parse_json(manifest, what=f"{source}: the manifest", max_values=MAX_LISTING_VALUES)
        if "manifests" in fields:
            raise AdapterIncompatibleError(
                f"{source}: an index of {len(fields['manifests'])} manifests, not one artifact; name one of them by its digest"
            )
        for layer in fields["layers"]:
            name = _name_of(layer)
            if "tar" in str(layer.get("mediaType", "")):
                archives.append(name or layer["digest"])
            elif name in found:
                raise AdapterCorruptUploadError(f"{source}: two layers are named {name[:200]}")
            elif name and _DIGEST.fullmatch(layer["digest"]) is not None:
                found[name] = _Layer(layer["digest"], int(layer["size"]))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise AdapterCorruptUploadError(f"{source}: it is no manifest of the distribution protocol") from error
    if archives and not found:
        raise AdapterIncompatibleError(
            f"{source}: {str(archives[0])[:200]}: an archive is not read; push the adapter's files one by one, each a layer "
            f"with its name in {NAME_ANNOTATIONS[0]} (oras push REPO adapter_config.json adapter_model.safetensors)"
        )
    return found


def _name_of(layer: Any) -> str:
    annotations = layer.get("annotations") or {}
    return next((str(annotations[name]) for name in NAME_ANNOTATIONS if annotations.get(name)), "").removeprefix("./")
