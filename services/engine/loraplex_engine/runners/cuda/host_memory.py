"""Host memory that the device copies from: the arena, pinned in the background, and a ring of small pinned buffers."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Final

import torch
from cuda.bindings import runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

OS_PAGE: Final = 4096
CHUNK_BYTES: Final = 256 * 1024 * 1024  # pinning takes 0.56 s a GiB on an H100's host; small chunks stop soon


class CudaError(RuntimeError):
    """The CUDA runtime refused a call; the message names it."""


def check(result: tuple[object, ...], what: str) -> None:
    """Raise CudaError unless a call of the runtime succeeded."""
    if result[0] != runtime.cudaError_t.cudaSuccess:
        raise CudaError(f"{what}: {result[0]}")


class PinnedArena:
    """Registers an arena's slots with the device, chunk by chunk, on a thread of its own.

    Copies from registered slots run at the link's full rate and return at once; copies from other slots must be staged.
    Chunks are whole slots, so no slot's copy crosses the border of two registrations, which the device refuses; copies of several
    slots end at it (`bytes_to_border`).

    Attributes:
        chunk_bytes: Bytes of a registration, but for the last.
    """

    def __init__(self, view: NDArray[np.uint8], device: torch.device) -> None:
        num_slots, slot_bytes = view.shape
        self._view = view  # keeps the memory mapped until it is unregistered
        self._begin = view.__array_interface__["data"][0]
        self._device = device
        # The borders of two chunks must not share a page of the operating system.
        unit = math.lcm(slot_bytes, OS_PAGE)
        self.chunk_bytes = max(CHUNK_BYTES // unit, 1) * unit
        self._num_bytes = num_slots * slot_bytes
        self._pinned_bytes = 0  # [0, _pinned_bytes) is pinned; written by the thread only
        self._is_stopping = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._register, name="arena-pinning", daemon=True)
        self._thread.start()

    def holds(self, address: int, num_bytes: int) -> bool:
        """Tell whether a piece of memory is registered by now.

        Raises:
            CudaError: If the device refused to register the arena.
        """
        if self._error is not None:
            raise self._error
        return bool(self._begin <= address and address + num_bytes <= self._begin + self._pinned_bytes)

    def bytes_to_border(self, address: int) -> int | None:
        """Return how many bytes from a piece of memory on belong to one registration; None outside of the arena."""
        offset = address - self._begin
        return self.chunk_bytes - offset % self.chunk_bytes if 0 <= offset < self._num_bytes else None

    def wait(self) -> None:
        """Block until the whole arena is registered, or cannot be."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Unregister; no copy may be under way."""
        self._is_stopping = True
        self._thread.join()
        for begin in range(0, self._pinned_bytes, self.chunk_bytes):
            check(runtime.cudaHostUnregister(self._begin + begin), "cudaHostUnregister")
        self._pinned_bytes = 0

    def _register(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            for begin in range(0, self._num_bytes, self.chunk_bytes):
                if self._is_stopping:
                    return
                size = min(self.chunk_bytes, self._num_bytes - begin)
                check(runtime.cudaHostRegister(self._begin + begin, size, 0), f"cudaHostRegister of {size} bytes")
                self._pinned_bytes = begin + size
        except Exception as error:  # raised again at the next copy
            self._error = error


class PinnedBuffer:
    """One host buffer and the event after which it may be written again."""

    def __init__(self, num_ints: int) -> None:
        self.tensor: Tensor = torch.zeros(num_ints, dtype=torch.int32, pin_memory=True)
        self.array: NDArray[np.int32] = self.tensor.numpy()
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]


class PinnedRing:
    """Host buffers used in turn; there are more buffers than steps in flight, so waiting for one is rare."""

    def __init__(self, num_ints: int, count: int) -> None:
        self._buffers = [PinnedBuffer(num_ints) for _ in range(count)]
        self._next = 0

    def take(self) -> PinnedBuffer:
        """Return the next buffer once the device has read it; record its event behind the copy."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        buffer.event.synchronize()  # an event never recorded counts as reached
        return buffer
