"""A `KernelLibrary` whose LoRA kernels only record what they would compute, read from items in memory where a kernel would."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_kernels.lora.items import GROUP_INTS, GROUP_TOKENS_AT, ITEM_INTS
from loraplex_kernels.module import KernelLibrary
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Launch:
    """What one launch computes, item by item; of the outputs, an item of a tile that several share computes its share."""

    kernel: str
    tokens: list[NDArray[np.int32]]
    adapters: NDArray[np.int32]
    outputs: list[slice]
    shares: NDArray[np.float64]


def ints(address: int, *shape: int) -> NDArray[np.int32]:
    return np.frombuffer(ctypes.string_at(address, 4 * int(np.prod(shape))), dtype=np.int32).reshape(shape)


class RecordingKernel:
    """Reads the items of each launch where a kernel would."""

    def __init__(self, name: str, params: Any, launches: list[Launch]) -> None:
        self.params = params
        self.name, self._launches = name, launches

    def launch(self, x: int, y: int = 1, z: int = 1, *, stream: int | None = None) -> None:
        del stream
        if x * y * z == 0:
            return
        read = {"lora_prefill": self._segments, "lora_expand": self._groups, "lora_shrink": self._groups}[self.name]
        self._launches.append(read(x))

    def _segments(self, num_items: int) -> Launch:
        items, begin = ints(self.params.lora.items, num_items, ITEM_INTS), self.params.slice_begin
        return Launch(
            self.name,
            [np.arange(first, first + count, dtype=np.int32) for first, count in items[:, :2].tolist()],
            items[:, 2],
            [slice(begin[part & 3], begin[(part & 3) + 1]) for part in items[:, 3].tolist()],
            np.full(num_items, 0.5**self.params.log_shares),
        )

    def _groups(self, num_items: int) -> Launch:
        first, in_range = ints(self.params.lora.range, 2).tolist()
        assert in_range == num_items, "a grid as large as the items"
        items = ints(self.params.lora.items + 4 * ITEM_INTS * first, num_items, ITEM_INTS)
        groups = ints(self.params.lora.groups, int(items[:, 0].max()) + 1, GROUP_INTS)[items[:, 0]]
        assert (groups[:, 0] == items[:, 1]).all()
        return Launch(
            self.name,
            [group[GROUP_TOKENS_AT : GROUP_TOKENS_AT + group[1]] for group in groups],
            items[:, 1],
            [slice(begin, begin + count) for begin, count in items[:, 2:].tolist()],
            np.ones(num_items),
        )


class RecordingLibrary(KernelLibrary):
    """Records what kernels would compute instead of computing it; clusters have one CTA, so grids are as large as items."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype, self.arch, self.dependent = torch.device("cpu"), dtype, "host", False
        self._device_index = -1
        self.launches: list[Launch] = []

    def load(self, name: str, params: Any, block: int, *, defines: Sequence[str] = (), shared_bytes: int = 0) -> Any:
        del block, defines, shared_bytes
        return RecordingKernel(name, params, self.launches)
