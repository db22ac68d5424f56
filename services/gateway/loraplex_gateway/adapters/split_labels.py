"""Which revision of a split label a request gets."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def share_of(shares: Sequence[tuple[str, int]], *, label: str, sticky_key: str) -> str:
    """Return the digest of the share that a key falls into.

    Shares lie one after another in the order of digests, so that a change of two neighbouring weights moves only the keys
    between the old border and the new one.

    ```
    share of A        share of B
    [0, weight A)     [weight A, weight A + weight B)
    ```

    Args:
        shares: Digest and weight of each, in the order of digests.
        label: ``name:label``; two labels split their keys independently.
        sticky_key: Equal keys get the same share.
    """
    drawn = hashlib.blake2b(f"{label}\0{sticky_key}".encode(errors="surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(drawn, "little") % sum(weight for _, weight in shares)
    for digest, weight in shares:
        if place < weight:
            return digest
        place -= weight
    raise AssertionError  # the place is below the sum
