"""One file of the disk tier: written whole or not at all, and checked before its first use.

A file is a JSON header and its sha256, room up to the next 4 KiB, then the body in pages. The header has the digests of the
body's pieces (`loraplex_common.tree_digest`), so that threads check a body side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.tree_digest import PIECE_BYTES, piece_digests, tree_root

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC: Final = b"loraplex-cache-1\n"
TEMPORARY: Final = ".part"
_LENGTH: Final = struct.Struct("<I")
_ALIGN: Final = 4096
_MAX_HEADER_BYTES: Final = 64 * 1024 * 1024
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


class CacheFileError(Exception):
    """A file is damaged; args: what is wrong with it."""


@dataclass(frozen=True, slots=True)
class CacheFile:
    """An open file whose header is right.

    Attributes:
        fields: What the writer noted.
        body_start: First byte of the body.
        shape: ``(num_pages, page_bytes)``.
        digests: The digests of the body's pieces, behind each other.
    """

    path: Path
    fields: dict[str, Any]
    body_start: int
    shape: tuple[int, int]
    digests: bytes

    @property
    def pieces_per_page(self) -> int:
        """Pieces of one page."""
        return -(-self.shape[1] // PIECE_BYTES)

    def check_pages(self, descriptor: int, start: int, stop: int) -> None:
        """Check pages of the body; it is read, not mapped, so that a failing disk raises an error.

        Raises:
            CacheFileError: If a page is damaged or missing.
            OSError: If it cannot be read.
        """
        page_bytes, per_page = self.shape[1], self.pieces_per_page * _DIGEST_BYTES
        buffer = bytearray(page_bytes)
        for page in range(start, stop):
            _read_into(descriptor, memoryview(buffer), self.body_start + page * page_bytes)
            if piece_digests(memoryview(buffer)) != self.digests[page * per_page : (page + 1) * per_page]:
                raise CacheFileError(f"page {page} of {self.shape[0]} does not have its sha256")

    def body(self) -> NDArray[np.uint8]:
        """Return the pages, mapped read-only. They stay readable when the file has been deleted."""
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.body_start, shape=self.shape)


def write_cache_file(path: Path, fields: dict[str, Any], pages: NDArray[np.uint8]) -> int:
    """Write a file; after a crash it is there as a whole, or not at all.

    Args:
        path: Its place; a file there is replaced.
        fields: Facts of the content, JSON. If ``tree`` is among them, the body's digest must still be that one: a body that
            memory has damaged is not written.
        pages: The body, ``[num_pages, page_bytes]``.

    Returns:
        Bytes of the file.

    Raises:
        CacheFileError: If the body is not what ``tree`` says.
        OSError: If it cannot be written; nothing is left of it.
    """
    digests = b"".join(piece_digests(page.data) for page in pages)
    if "tree" in fields and fields["tree"] != tree_root([digests]):
        raise CacheFileError("its pages have changed in memory")
    text = json.dumps({"shape": list(pages.shape), "pieces": digests.hex(), "fields": fields}).encode()
    head = MAGIC + _LENGTH.pack(len(text)) + text + hashlib.sha256(text).digest()
    head += bytes(-len(head) % _ALIGN)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, memoryview(head))
            for page in pages:
                _write_all(descriptor, page.data.cast("B"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)
    return len(head) + pages.nbytes


def open_cache_file(path: Path, descriptor: int) -> CacheFile:
    """Read a file's header.

    Raises:
        CacheFileError: If it is damaged, or the file is too short or of another version.
        OSError: If it cannot be read.
    """
    start = bytearray(len(MAGIC) + _LENGTH.size)
    _read_into(descriptor, memoryview(start), 0)
    (length,) = _LENGTH.unpack_from(start, len(MAGIC))
    if not start.startswith(MAGIC) or length > _MAX_HEADER_BYTES:
        raise CacheFileError("it is no cache file of this version")
    rest = bytearray(length + _DIGEST_BYTES)
    _read_into(descriptor, memoryview(rest), len(start))
    text = bytes(rest[:length])
    if hashlib.sha256(text).digest() != rest[length:]:
        raise CacheFileError("its header does not have its sha256")
    header = json.loads(text)
    head_bytes = len(start) + len(rest)
    body_start = head_bytes + -head_bytes % _ALIGN
    shape = (int(header["shape"][0]), int(header["shape"][1]))
    if (size := os.fstat(descriptor).st_size) != body_start + shape[0] * shape[1]:
        raise CacheFileError(f"it has {size} bytes, not {body_start + shape[0] * shape[1]}")
    return CacheFile(path, header["fields"], body_start, shape, bytes.fromhex(header["pieces"]))


def _write_all(descriptor: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_into(descriptor: int, rest: memoryview, position: int) -> None:
    while rest:
        num_read = os.preadv(descriptor, [rest], position)
        if not num_read:
            raise CacheFileError("it is cut short")
        rest, position = rest[num_read:], position + num_read


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
