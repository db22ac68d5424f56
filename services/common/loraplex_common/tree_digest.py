"""The digest of an image: sha256 over the sha256 digests of its pieces, so that several threads can compute it.

A piece has `PIECE_BYTES`, or less at the end of a page: none lies in two pages. So a page's pieces can be hashed wherever
the page lies, before or after the others.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

PIECE_BYTES: Final = 1024 * 1024


def piece_digests(page: memoryview) -> bytes:
    """Return the digests of a page's pieces behind each other, 32 bytes each. Other threads run meanwhile.

    Args:
        page: Bytes, contiguous.
    """
    starts = range(0, len(page), PIECE_BYTES)
    return b"".join(hashlib.sha256(page[start : start + PIECE_BYTES]).digest() for start in starts)


def tree_root(digests: Iterable[bytes]) -> str:
    """Return the digest of an image, 64 hex digits, from those of its pages' pieces in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def tree_sha256(pages: NDArray[np.uint8]) -> str:
    """Return the digest of an image ``[num_pages, page_bytes]``."""
    return tree_root(piece_digests(page.data) for page in pages)
