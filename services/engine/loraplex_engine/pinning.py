"""What a runner offers that copies adapters faster from pinned memory; the engine's one optional call to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime_checkable
class PinsHostMemory(Protocol):
    """A runner that can pin the arena's memory."""

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> object:
        """Start to pin memory that images will come from, ``[num_slots, page_bytes]``; it stays mapped until `close`."""
        ...
