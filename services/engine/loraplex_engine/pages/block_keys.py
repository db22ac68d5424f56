"""Names of blocks of tokens: equal names mean equal keys and values in every layer.

A block's name is a hash over everything that its keys and values depend on: the base model's numerics, the adapter's revision (or none, or several in
the order in which they are added), the request's factor on each adapter's scaling, the cache salt, and *all* tokens up to the block's end. A layer's keys and
values depend on every adapted module below it, so blocks of an adapter never have the base model's names, whichever
modules the adapter changes. The one exception: blocks that lie wholly before the token from which an activated adapter
applies are computed by the base model alone, and have its names.

The hash is BLAKE2b with 128 bits: with 2**40 blocks ever named, the odds that two different blocks share a name are
below 2**-48. One running hash per sequence names its blocks in turn, in less than a microsecond each, when the sequence
is admitted and when it leaves its slot; nothing is hashed while it decodes.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from loraplex_engine.messages import AdapterTerm

KEY_BYTES: Final = 16


class BlockKeys:
    """Names of the full blocks of one growing sequence.

    Args:
        adapter_digest: Revision of the sequence's adapter; None for the base model.
        adapter_scale: The request's own factor on the adapter's scaling; means nothing without an adapter.
        cache_salt: Sequences share blocks only if their salts are equal.
        block_tokens: Tokens of a block.
        numerics: What loading did to the base model's numbers, keys and values included.
        adapter_start: First token that the adapter applies to; None: it applies to all.
        more_adapters: Adapters that are added to the first one, in this order; none of them beside ``adapter_start``.

    Attributes:
        keys: Names of the full blocks, in order.
    """

    __slots__ = ("_activation", "_block_tokens", "_hash", "_num_base_blocks", "keys")

    def __init__(
        self,
        *,
        adapter_digest: str | None,
        adapter_scale: float,
        cache_salt: str,
        block_tokens: int,
        numerics: str = "",
        adapter_start: int | None = None,
        more_adapters: Iterable[AdapterTerm] = (),
    ) -> None:
        self._block_tokens = block_tokens
        self._hash = hashlib.blake2b(digest_size=KEY_BYTES)
        if numerics:
            self._add(b"numerics", numerics.encode())  # the first part is no digest
        self._activation: tuple[bytes, ...] = ()
        self._num_base_blocks = 0
        identity = ((adapter_digest or "").encode(), struct.pack("<f", adapter_scale if adapter_digest else 1.0))
        for term in more_adapters:  # with its length, no list reads as another
            digest = term.digest.encode()
            identity = (identity[0] + struct.pack("<qf", len(digest), term.scale) + digest, identity[1])
        if adapter_start is not None and adapter_digest is not None:
            self._activation = (*identity, struct.pack("<q", adapter_start))
            self._num_base_blocks = adapter_start // block_tokens
            identity = (b"", struct.pack("<f", 1.0))
        self._add(identity[0], cache_salt.encode(), identity[1])
        self.keys: list[bytes] = []

    def _add(self, *parts: bytes) -> None:
        for part in parts:
            self._hash.update(struct.pack("<q", len(part)))  # with its length, no part reads as the end of another
            self._hash.update(part)

    def extend(self, token_ids: NDArray[np.int32]) -> list[bytes]:
        """Name all full blocks of a sequence that begins with the tokens named so far, and return all names.

        The name of block i covers the tokens ``[0, (i + 1) * block_tokens)``; tokens behind the last full block have
        none.

        Args:
            token_ids: int32 ``[num_tokens]``; the whole sequence.
        """
        hasher, keys = self._hash, self.keys
        size = 4 * self._block_tokens
        data = memoryview(token_ids[len(keys) * self._block_tokens :].astype(np.int32, copy=False).tobytes())
        for first in range(0, len(data) - size + 1, size):
            if self._activation and len(keys) == self._num_base_blocks:
                self._add(*self._activation)
            hasher.update(data[first : first + size])
            keys.append(hasher.digest())
        return keys
