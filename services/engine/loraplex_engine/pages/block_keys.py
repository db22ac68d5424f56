"""Names of blocks of tokens: equal names mean equal keys and values in every layer.

A block's name is a hash over everything that its keys and values depend on: the adapter's revision (or none), the
request's factor on the adapter's scaling, the cache salt, and *all* tokens up to the block's end. A layer's keys and
values depend on every adapted module below it, so whatever an adapter touches, its blocks never have the base's names.

128 bits of BLAKE2b: with 2**40 blocks ever named, the odds that two differ and share a name are below 2**-48. One
running hash per sequence names its blocks in turn, under a microsecond each, when it is admitted and when it leaves its
slot; nothing is hashed while it decodes.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_BYTES: Final = 16


class BlockKeys:
    """Names of the full blocks of one growing sequence.

    Args:
        adapter_digest: Revision of its adapter; None for the base model.
        adapter_scale: The request's own factor on the adapter's scaling; means nothing without an adapter.
        cache_salt: Only requests of equal salts share.
        block_tokens: Tokens of a block.

    Attributes:
        keys: By block.
    """

    __slots__ = ("_block_tokens", "_hash", "keys")

    def __init__(self, *, adapter_digest: str | None, adapter_scale: float, cache_salt: str, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._hash = hashlib.blake2b(digest_size=KEY_BYTES)
        scale = adapter_scale if adapter_digest is not None else 1.0
        for part in ((adapter_digest or "").encode(), cache_salt.encode(), struct.pack("<f", scale)):
            self._hash.update(struct.pack("<q", len(part)))  # no part can pass for the end of another
            self._hash.update(part)
        self.keys: list[bytes] = []

    def extend(self, token_ids: NDArray[np.int32]) -> list[bytes]:
        """Name all full blocks of a sequence that begins with the tokens named so far, and return all names.

        Args:
            token_ids: int32 ``[num_tokens]``; the whole sequence.
        """
        hasher, keys = self._hash, self.keys
        size = 4 * self._block_tokens
        data = memoryview(token_ids[len(keys) * self._block_tokens :].astype(np.int32, copy=False).tobytes())
        for first in range(0, len(data) - size + 1, size):
            hasher.update(data[first : first + size])
            keys.append(hasher.digest())
        return keys
