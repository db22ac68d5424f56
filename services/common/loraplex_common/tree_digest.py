"""The digest of an image: sha256 over the sha256 digests of its pieces, so that several threads can compute it.

A piece has `PIECE_BYTES`, or less at the end of a page: none lies in two pages. So a page's pieces can be hashed wherever
the page lies, before or after the others.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

PIECE_BYTES: Final = 1024 * 1024


def piece_digests(*views: memoryview) -> bytes:
    """Return the digests of a page's pieces behind each other, 32 bytes each. Other threads run meanwhile.

    Args:
        views: The page's bytes, each view contiguous: one, or several that follow each other.
    """
    found: list[bytes] = []
    piece, room = hashlib.sha256(), PIECE_BYTES
    for view in views:
        for part in _cut(view, room):
            piece.update(part)
            room -= len(part)
            if not room:
                found.append(piece.digest())
                piece, room = hashlib.sha256(), PIECE_BYTES
    return b"".join(found) if room == PIECE_BYTES else b"".join((*found, piece.digest()))


def _cut(view: memoryview, first: int) -> Iterator[memoryview]:
    """Yield a view in parts that end where a piece does, the first after that many bytes."""
    start, stop = 0, first
    while start < len(view):
        yield view[start:stop]
        start, stop = stop, stop + PIECE_BYTES


def tree_root(digests: Iterable[bytes]) -> str:
    """Return the digest of an image, 64 hex digits, from those of its pages' pieces in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def tree_sha256(pages: NDArray[np.uint8]) -> str:
    """Return the digest of an image ``[num_pages, page_bytes]``."""
    return tree_root(piece_digests(page.data) for page in pages)
