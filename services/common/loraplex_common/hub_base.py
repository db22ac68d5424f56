"""A base model by its name on a Hugging Face hub: the files that are read, at one commit, through `huggingface_hub`.

Its cache, its settings (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``), its resumed downloads and its bars
are used as they are.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.config_values import BaseModelError
from loraplex_common.log import get_logger
from loraplex_common.weight_digests import weight_digests

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HUB_BASE: Final = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<commit>[0-9a-f]{40}))?", re.ASCII)
ALLOWED: Final = (
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""Files of a repository's top folder that are fetched: no pickle, no code, no second copy of the weights."""
SHARDS: Final = "model*.safetensors"
DEFAULT_BRANCH: Final = "main"
TRY_AGAIN: Final = "try again, what has come is kept"
STATUS_REMEDIES: Final = {
    401: "set HF_TOKEN to a token that it takes; one that is set may have expired",
    403: "the token in HF_TOKEN may not read this repository; accept its terms, or use a token that may",
    404: "the file or the repository is gone; look for it there, or name another commit",
    429: "it has had too many requests: wait a while, or set HF_TOKEN, then try again; what has come is kept",
}
"""What to do about an answer of the hub; about others: `TRY_AGAIN`."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_log = get_logger()


class HubBaseError(BaseModelError):
    """A base model of the hub cannot be had; the message says why, and what to do."""


def hub_base(name: str | Path | None) -> re.Match[str] | None:
    """Return the parts of ``org/name[@commit]``; None for a directory that exists and for what is no such name."""
    if name is None or Path(name).exists():
        return None
    return HUB_BASE.fullmatch(os.fspath(name))


def fetch_hub_base(name: str, *, out_dir: Path | None = None) -> tuple[Path, str]:
    """Fetch a base model, or what its last download lacks; show bars on a terminal.

    Args:
        name: ``org/name``, at the commit where its default branch is, or ``org/name@commit``.
        out_dir: Where to put it; the library's cache if unset.

    Returns:
        The directory, and the commit.

    Raises:
        HubBaseError: If the name is none, the repository or commit is not there, not allowed or cannot be reached, it has
            no safetensors weights, a shard's bytes are not those that the hub names, the directory holds files of another
            commit, or the disk is full; the message has the remedy.
    """
    if (parts := HUB_BASE.fullmatch(name)) is None:
        raise HubBaseError(f"{name}: expected org/name, or org/name@COMMIT with 40 hex digits: branches and tags move")
    repo, commit = parts["repo"], parts["commit"]
    _check_endpoint(name)
    with _told(name, repo):
        if out_dir is None:
            folder = _snapshot(repo, commit or DEFAULT_BRANCH, None)
            digests = _digests_of_cache(folder)
        else:
            commit, digests = _listed(repo, commit, out_dir)
            folder = _snapshot(repo, commit, out_dir)
        damaged = _damaged(folder, digests)
    if damaged:
        raise HubBaseError(f"{name}: {damaged} is not what the hub has; remove that file, and try again")
    if not (folder / "config.json").is_file() or not any(folder.glob(SHARDS)):
        raise HubBaseError(
            f"{name}: has no config.json with model*.safetensors beside it; pickled weights are not fetched"
        )
    return folder, commit or folder.name


def _check_endpoint(name: str) -> None:
    from huggingface_hub import constants

    if not re.match(r"https?://[^/\s]", constants.ENDPOINT):
        raise HubBaseError(
            f"{name}: HF_ENDPOINT {constants.ENDPOINT!r} is no address; give http:// or https:// and a host"
        )


def _snapshot(repo: str, revision: str, out_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    allowed = [*ALLOWED]
    return Path(
        snapshot_download(repo, revision=revision, local_dir=out_dir, allow_patterns=allowed, ignore_patterns="*/*")
    )


def _digests_of_cache(folder: Path) -> dict[str, str]:
    """Return the sha256 of shards in the library's cache, which names big files by it: file name -> hex digits."""
    blobs = {file.name: file.resolve().name for file in folder.glob(SHARDS)}
    return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}


def _listed(repo: str, commit: str | None, out_dir: Path) -> tuple[str, dict[str, str]]:
    """Return the commit, and the sha256 that the hub has of its shards: file name -> hex digits.

    Args:
        repo: ``org/name``.
        commit: None for where the default branch is.
        out_dir: A plain directory, which does not say which commit it is of.

    Raises:
        HubBaseError: If there is no hub to ask, or the directory has files that the commit does not have: of two models in one
            directory, the loader would read either.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    try:
        commit = commit or HfApi().model_info(repo).sha or DEFAULT_BRANCH
        files = [each for each in HfApi().list_repo_tree(repo, revision=commit) if isinstance(each, RepoFile)]
    except OfflineModeIsEnabled as error:
        raise HubBaseError(
            f"{repo}: offline (HF_HUB_OFFLINE): --out needs the hub, which says what belongs there"
        ) from error
    here = {file.name for pattern in ALLOWED for file in out_dir.glob(pattern)}
    if strange := sorted(here - {each.path for each in files}):
        raise HubBaseError(
            f"{repo}@{commit}: {out_dir} has {', '.join(strange)}, which this commit has not; give a directory of its own to --out"
        )
    return commit, {each.path: each.lfs.sha256 for each in files if each.lfs is not None}


def _damaged(folder: Path, digests: Mapping[str, str]) -> Path | None:
    """Return the first shard whose bytes are not those that the hub names; the library compares their number only."""
    shards = [file for file in sorted(folder.glob(SHARDS)) if file.name in digests]
    found = weight_digests(shards)
    return next((file.resolve() for file in shards if found[file] != digests[file.name]), None)


def local_base(model: Path) -> tuple[Path, str | None]:
    """Return the directory of a service's ``--model``, and its repository's name if it is one of the hub's.

    What is not on this machine is fetched, which takes as long as the download.

    Args:
        model: A directory, or ``org/name[@commit]``.

    Raises:
        HubBaseError: In the cases of `fetch_hub_base`.
    """
    if (parts := hub_base(model)) is None:
        return model, None
    directory, commit = fetch_hub_base(os.fspath(model))
    _log.info("base model of the hub", model=parts["repo"], commit=commit, directory=str(directory))
    if parts["commit"] is None:
        _log.warning(
            "the base model is not pinned: a service that starts after its repository has changed serves another one",
            remedy=f"--model {parts['repo']}@{commit}",
        )
    return directory, parts["repo"]


def local_bases(models: Sequence[Path]) -> tuple[tuple[Path, ...], str | None]:
    """Return the directories of several base models, and the first one's name on the hub; raises as `local_base` does."""
    found = [local_base(model) for model in models]
    return tuple(directory for directory, _ in found), found[0][1]


@contextmanager
def _told(name: str, repo: str) -> Iterator[None]:
    """Turn the library's failures into one line with a remedy."""
    try:
        yield
    except BaseModelError:
        raise
    except (OSError, ValueError) as error:  # the library's own are both
        raise HubBaseError(f"{name}: {_remedy(error, repo)}") from error


def _remedy(error: Exception, repo: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms at {constants.ENDPOINT}/{repo} and set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such commit in this repository"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository at {constants.ENDPOINT}; one that is private needs HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return "is no name that a repository of the hub can have; look for it there"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full; free room, or set HF_HOME to another one ({constants.HF_HUB_CACHE}), and try again"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{error.filename}: {error.strerror}; make the directory one that can be written to, or give another"
    if (status := _status(error)) is not None:
        return f"{constants.ENDPOINT} answered {status}; {STATUS_REMEDIES.get(status, TRY_AGAIN)}"
    return (
        f"{constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set), and {constants.HF_HUB_CACHE} has no whole copy "
        f"({type(error).__name__}); try again, set HF_ENDPOINT to a mirror, or give a directory"
    )


def _status(error: BaseException | None) -> int | None:
    """Return the status that the hub answered with, if that is what failed; the library wraps it once there is no copy."""
    from huggingface_hub import errors

    while error is not None:
        if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
            return int(error.response.status_code)
        error = error.__cause__
    return None
