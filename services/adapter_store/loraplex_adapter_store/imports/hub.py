"""Import from the Hugging Face hub, pinned to a commit: only the files of the allow-list, into a quarantine directory."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loraplex_common.adapter_folder import check_present
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from loraplex_common.ids import check_adapter_name

from loraplex_adapter_store.imports.files import CheckpointFiles, check_size, from_contents

_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_FOLDER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*", re.ASCII)
TIMEOUT_S: Final = 30.0
# What a lost connection raises: the hub library moved from httpx to httpx2 and names neither in its interface.
_TransportError: Final[type[Exception]] = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A folder of a repository at a commit."""

    repo: str
    revision: str
    subfolder: str = ""

    def check(self) -> None:
        """Raise `InvalidParameterError` if a field is malformed."""
        check_adapter_name(self.repo, field="hf.repo")
        if "/" not in self.repo:
            raise InvalidParameterError(f"{self.repo!r} is not of the form org/name", field="hf.repo")
        if _COMMIT.fullmatch(self.revision) is None:
            raise InvalidParameterError(
                f"{self.revision[:80]!r} is no commit: 40 lower-case hex digits, because branches and tags move",
                field="hf.revision",
            )
        if self.subfolder and (_FOLDER.fullmatch(self.subfolder) is None or ".." in self.subfolder):
            raise InvalidParameterError(f"{self.subfolder[:200]!r} is no folder name", field="hf.subfolder")

    def __str__(self) -> str:
        folder = f"/{self.subfolder}" if self.subfolder else ""
        return f"hf:{self.repo}@{self.revision}{folder}"


class Hub:
    """Downloads checkpoints.

    Args:
        endpoint: URL of the hub; None for the public one.
        scratch: Where quarantine directories are made; None for the system's place.
    """

    def __init__(self, endpoint: str | None, scratch: Path | None = None) -> None:
        self._endpoint = endpoint
        self._scratch = scratch

    def read(self, source: HubSource, token: str | None, max_adapter_bytes: int) -> CheckpointFiles:
        """Download a checkpoint; blocks. Nothing of it stays on disk.

        Raises:
            AdapterNotFoundError: If repository or commit do not exist, or are not visible with the credential.
            AdapterForbiddenError: If the repository is gated.
            AdapterCorruptUploadError: If a file is missing or too large.
            AdapterIncompatibleError: If the folder is something else than a PEFT adapter.
            StoreUnavailableError: If the hub cannot be reached.
        """
        try:
            return self._read(source, token, max_adapter_bytes)
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
        except (httpx2.HTTPError, OSError) as error:
            raise StoreUnavailableError(
                f"{source}: cannot be downloaded: {type(error).__name__}", retry_after_s=10.0
            ) from error

    def _read(self, source: HubSource, token: str | None, max_adapter_bytes: int) -> CheckpointFiles:
        api = huggingface_hub.HfApi(endpoint=self._endpoint, token=token or False)
        sizes = _sizes(api, source, max_adapter_bytes + 1)
        prefix = f"{source.subfolder}/" if source.subfolder else ""
        names = check_present(sizes)
        for name in names:
            check_size(name, sizes[name], max_adapter_bytes)
        with tempfile.TemporaryDirectory(prefix="loraplex-import-", dir=self._scratch) as quarantine:
            folder = huggingface_hub.snapshot_download(
                source.repo,
                revision=source.revision,
                allow_patterns=[prefix + name for name in names],
                local_dir=quarantine,
                endpoint=self._endpoint,
                token=token or False,
                etag_timeout=TIMEOUT_S,
                max_workers=2,
            )
            return from_contents(_read_all(Path(str(folder), source.subfolder), names, max_adapter_bytes), str(source))


def _sizes(api: huggingface_hub.HfApi, source: HubSource, unknown: int) -> dict[str, int]:
    """Return the files of the source's folder and their sizes; ``unknown`` where the hub tells none."""
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    try:
        info = api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=TIMEOUT_S)
        return {
            sibling.rfilename.removeprefix(prefix): unknown if sibling.size is None else int(sibling.size)
            for sibling in info.siblings or ()
            if sibling.rfilename.startswith(prefix)
        }
    except HFValidationError:
        raise
    # The library reads the answer without a look at its form; a proxy's page or another server's JSON ends like this.
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise StoreUnavailableError(f"{source}: the hub's answer is not a hub's", retry_after_s=10.0) from error


def _read_all(folder: Path, names: list[str], max_adapter_bytes: int) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise AdapterCorruptUploadError(f"{name} is missing from the download")
        check_size(name, path.stat().st_size, max_adapter_bytes)
        contents[name] = path.read_bytes()
    return contents
