"""Imports from a directory below a configured root; for callers, nothing exists outside the roots.

The path is resolved first, and then opened component by component from the root without ever following a link. So
replacing a component by a link in between gains an attacker nothing.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from loraplex_common.adapter_folder import MAX_DEPTH, MAX_LISTED, check_present_signed
from loraplex_common.errors import AdapterCorruptUploadError, InvalidParameterError

from loraplex_adapter_store.imports.files import CheckpointFiles, check_size, from_contents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not block us


class ImportRoots:
    """The directories that imports may read from.

    Args:
        roots: Existing directories; none means that directory imports are off.
        reads_signature: Tells whether signatures are wanted.
    """

    def __init__(self, roots: tuple[Path, ...], reads_signature: Callable[[], bool] = lambda: False) -> None:
        self._reads_signature = reads_signature
        self._roots = tuple(root.resolve(strict=True) for root in roots)

    def locate(self, uri: str) -> tuple[Path, tuple[str, ...]]:
        """Return the root that a ``file:///dir`` URI lies below, and the components below it.

        Raises:
            InvalidParameterError: If it is not such a URI or lies outside all roots; the message does not say what
                exists there.
        """
        try:
            parts = urlsplit(uri)
        except ValueError as error:  # e.g. a host that is not an address
            raise InvalidParameterError(f"{uri[:200]!r} is no URI: {error}", field="uri") from error
        path = unquote(parts.path)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise InvalidParameterError(f"{uri[:200]!r} is not of the form file:///dir", field="uri")
        if not path.startswith("/") or "\0" in path:
            raise InvalidParameterError(f"{uri[:200]!r} is no absolute path", field="uri")
        resolved = Path(os.path.realpath(path))
        for root in self._roots:
            if resolved.is_relative_to(root):
                return root, resolved.relative_to(root).parts
        raise InvalidParameterError(
            f"{uri[:200]!r} is not below an import root of this store (--import-root)", field="uri"
        )

    async def fetch(self, uri: str, max_adapter_bytes: int, take: Callable[[int], None]) -> CheckpointFiles:
        """Call `read` in a thread."""
        return await asyncio.to_thread(self.read, uri, max_adapter_bytes, take)

    def read(self, uri: str, max_adapter_bytes: int, take: Callable[[int], None]) -> CheckpointFiles:
        """Read the checkpoint in a directory; blocks.

        Args:
            uri: The directory.
            max_adapter_bytes: Most bytes of the weights.
            take: Waits for memory for that many more bytes; called before each file is read.

        Raises:
            InvalidParameterError: If the directory is outside the roots or cannot be opened.
            AdapterCorruptUploadError: If a file is missing, too large or not a regular file.
            AdapterIncompatibleError: If the folder is not a PEFT adapter.
            SaturatedError: If there is no memory for it.
        """
        root, parts = self.locate(uri)
        contents: dict[str, bytes] = {}
        try:
            with _open_below(root, parts, _DIRECTORY_FLAGS) as directory:
                names = check_present_signed(_listed(directory), signature=self._reads_signature())
            for name in names:
                contents[name] = self._read_file(root, Path(root, *parts, name), max_adapter_bytes, take)
        except OSError as error:
            raise InvalidParameterError(f"{uri[:200]!r} cannot be read: {error.strerror}", field="uri") from error
        return from_contents(contents, "dir:" + ("/".join(parts) or root.name))

    def _read_file(self, root: Path, path: Path, max_adapter_bytes: int, take: Callable[[int], None]) -> bytes:
        resolved = Path(os.path.realpath(path))  # hub caches link files to their blobs; inside the root that is allowed
        if not resolved.is_relative_to(root):
            raise InvalidParameterError(f"{path.name} is a link that leaves the import root", field="uri")
        try:
            with _open_below(root, resolved.relative_to(root).parts, _FILE_FLAGS) as descriptor:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise AdapterCorruptUploadError(f"{path.name} is no regular file")
                size = check_size(path.name, status.st_size, max_adapter_bytes)
                take(size)
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    data = file.read(size + 1)
        except OSError as error:
            raise AdapterCorruptUploadError(f"{path.name} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise AdapterCorruptUploadError(f"{path.name} changed while it was read")
        return data


@contextmanager
def _open_below(root: Path, parts: tuple[str, ...], flags: int) -> Iterator[int]:
    """Open root/parts without following any link, and yield the descriptor."""
    descriptor = os.open(root, _DIRECTORY_FLAGS)
    try:
        for index, part in enumerate(parts):
            following = os.open(part, flags if index == len(parts) - 1 else _DIRECTORY_FLAGS, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = following
        yield descriptor
    finally:
        os.close(descriptor)


def _listed(directory: int, prefix: str = "", depth: int = 0) -> list[str]:
    """Return the files below an open directory in `check_present`'s form, never following a link to a directory."""
    names: list[str] = []
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir(follow_symlinks=False):
                names.append(prefix + entry.name)
            elif depth < MAX_DEPTH and len(names) < MAX_LISTED:
                names += _listed_inside(directory, entry.name, prefix, depth + 1)
    return names if depth == 0 else names[:MAX_LISTED]


def _listed_inside(directory: int, name: str, prefix: str, depth: int) -> list[str]:
    try:
        descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
    except OSError:
        return []  # gone meanwhile, or not readable: no part of this adapter
    try:
        return _listed(descriptor, f"{prefix}{name}/", depth)
    finally:
        os.close(descriptor)
