"""Import from the Hugging Face hub, pinned to a commit: only the files of the allow-list, straight into memory."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loraplex_common.adapter_folder import check_present_signed
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from loraplex_common.ids import check_adapter_name

from loraplex_adapter_store.checkpoint.bounds import MAX_LISTING_BYTES, MAX_LISTING_VALUES, parse_json
from loraplex_adapter_store.imports.download import Download, Protocol
from loraplex_adapter_store.imports.files import CheckpointFiles, check_size, from_contents, limit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loraplex_adapter_store.imports.threads import DownloadThreads

DEFAULT_BRANCH: Final = "main"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_FOLDER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A folder of a repository at a commit; without a commit, at the one where its default branch is when it is read."""

    repo: str
    revision: str = ""
    subfolder: str = ""

    def check(self) -> None:
        """Raise `InvalidParameterError` if a field is malformed."""
        check_adapter_name(self.repo, field="hf.repo")
        if "/" not in self.repo:
            raise InvalidParameterError(f"{self.repo!r} is not of the form org/name", field="hf.repo")
        if self.revision and _COMMIT.fullmatch(self.revision) is None:
            raise InvalidParameterError(
                f"{self.revision[:80]!r} is no commit: 40 lower-case hex digits, because branches and tags move",
                field="hf.revision",
            )
        if self.subfolder and (_FOLDER.fullmatch(self.subfolder) is None or ".." in self.subfolder):
            raise InvalidParameterError(f"{self.subfolder[:200]!r} is no folder name", field="hf.subfolder")

    def __str__(self) -> str:
        folder = f"/{self.subfolder}" if self.subfolder else ""
        commit = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{commit}{folder}"


class Hub:
    """Downloads checkpoints.

    Args:
        endpoint: URL of the hub; None for the public one.
        threads: Where downloads run.
        reads_signature: Tells whether signatures are wanted.
    """

    def __init__(
        self, endpoint: str | None, threads: DownloadThreads, reads_signature: Callable[[], bool] = lambda: False
    ) -> None:
        self._reads_signature = reads_signature
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._threads = threads

    async def fetch(
        self, source: HubSource, token: str | None, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        """Call `read` in a thread, once one is free."""
        return await self._threads.run(partial(self.read, source, token, max_adapter_bytes, take))

    def read(
        self, source: HubSource, token: str | None, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        """Download a checkpoint; blocks.

        Args:
            source: The folder to download.
            token: Credential, if any.
            max_adapter_bytes: Most bytes of the weights; enforced, whatever size the hub announced.
            take: Waits for memory for that many more bytes.

        Raises:
            AdapterNotFoundError: If repository or commit do not exist, or are not visible with the credential.
            AdapterForbiddenError: If the repository is gated.
            AdapterCorruptUploadError: If a file is missing or too large.
            AdapterIncompatibleError: If the folder is not a PEFT adapter.
            DeadlineError: If the hub sends too slowly.
            SaturatedError: If there is no memory for the bytes.
            StoreUnavailableError: If the hub cannot be reached.
        """
        with _hub_errors(source):
            return self._read(source, token, max_adapter_bytes, take)

    async def pin(self, source: HubSource, token: str | None) -> HubSource:
        """Return a source at the commit where its default branch is; one with a commit as it is.

        Raises:
            LoraplexError: In the cases of `read`.
        """
        return source if source.revision else await self._threads.run(partial(self._pin, source, token))

    def _pin(self, source: HubSource, token: str | None) -> HubSource:
        with _hub_errors(source):
            return _pinned(source, self._listing(source, token))

    def _read(
        self, source: HubSource, token: str | None, max_adapter_bytes: int, take: Callable[[int], None]
    ) -> CheckpointFiles:
        listing = self._listing(source, token)
        source, sizes = _pinned(source, listing), _sizes(source, listing)
        names = check_present_signed(sizes, signature=self._reads_signature())
        for name in names:
            check_size(name, sizes[name] or 0, max_adapter_bytes)
        contents: dict[str, bytes | bytearray] = {}
        for name in names:
            url = hf_hub_url(
                source.repo, name, subfolder=source.subfolder, revision=source.revision, endpoint=self._endpoint
            )
            limit = limit_of(name, max_adapter_bytes)
            contents[name] = _download(url, token, limit=limit, take=take, what=f"{source}: {name}").read()
        return from_contents(contents, str(source))

    def _listing(self, source: HubSource, token: str | None) -> Any:
        """Return what the hub says of the source's commit."""
        revision = quote(source.revision or DEFAULT_BRANCH, safe="")
        url = f"{self._endpoint}/api/models/{source.repo}/revision/{revision}?blobs=true"
        # The list is dropped before anything else is read, so it takes none of the imports' room.
        data = _download(
            url, token, limit=MAX_LISTING_BYTES, take=_take_none, what=f"{source}: its list of files"
        ).read()
        with _read_as_hubs(source):
            return parse_json(bytes(data), what="the list of files", max_values=MAX_LISTING_VALUES)


def _download(url: str, token: str | None, **options: Any) -> Download:
    return Download(url, f"Bearer {token}" if token else None, protocol=_HUB, **options)


@contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """Turn the failures of the hub inside the block into errors of the contract."""
    try:
        yield
    except GatedRepoError as error:
        raise AdapterForbiddenError(f"{source}: the repository is gated; name a credential with access") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise AdapterNotFoundError(
            f"{source}: no such repository or commit, or not visible with this credential"
        ) from error
    except HFValidationError as error:
        raise InvalidParameterError(f"{source}: {error}", field="hf.repo") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise AdapterForbiddenError(f"{source}: the hub answered {status} to this credential") from error
        raise StoreUnavailableError(f"{source}: the hub answered {status}", retry_after_s=10.0) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise StoreUnavailableError(
            f"{source}: cannot be downloaded: {type(error).__name__}", retry_after_s=10.0
        ) from error


@contextmanager
def _read_as_hubs(source: HubSource) -> Iterator[None]:
    """Turn what the page of a proxy, or another server's JSON, leads to into the error that it is."""
    try:
        yield
    except (AdapterCorruptUploadError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise StoreUnavailableError(f"{source}: the hub's answer is not a hub's", retry_after_s=10.0) from error


def _pinned(source: HubSource, listing: Any) -> HubSource:
    """Return the source at the commit that the list is of."""
    if source.revision:
        return source
    with _read_as_hubs(source):
        commit = listing["sha"]
        if _COMMIT.fullmatch(commit) is None:
            raise ValueError("no commit")
    return replace(source, revision=commit)


def _sizes(source: HubSource, listing: Any) -> dict[str, int | None]:
    """Return the files of the source's folder with their sizes; None as size if the hub gives none."""
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    sizes: dict[str, int | None] = {}
    with _read_as_hubs(source):
        for sibling in listing["siblings"]:
            name, size = sibling["rfilename"], sibling.get("size")
            if name.startswith(prefix):
                sizes[name.removeprefix(prefix)] = None if size is None else int(size)
    return sizes


def _take_none(_num_bytes: int) -> None:
    """Take no room."""


_HUB: Final = Protocol(client=get_session, raise_for_status=hf_raise_for_status)
