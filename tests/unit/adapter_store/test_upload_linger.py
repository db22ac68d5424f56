"""A refused upload is read on for a moment, so that its client sees the reason and not a broken stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_adapter_store.checkpoint.bounds import MAX_PART_BYTES
from loraplex_adapter_store.imports.uploads import LINGER_BYTES, linger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Parts:
    """Parts of a stream, counted as they are read."""

    def __init__(self, count: int) -> None:
        self.num_read, self._count = 0, count

    async def read(self) -> AsyncIterator[bytes]:
        while self.num_read < self._count:
            self.num_read += 1
            yield bytes(MAX_PART_BYTES)


async def test_what_a_client_still_sends_is_read_to_its_end() -> None:
    parts = Parts(3)

    await linger(parts.read())

    assert parts.num_read == 3


async def test_a_client_that_never_stops_is_not_read_for_long() -> None:
    parts = Parts(1 << 20)

    await linger(parts.read())

    assert parts.num_read == LINGER_BYTES // MAX_PART_BYTES + 1
