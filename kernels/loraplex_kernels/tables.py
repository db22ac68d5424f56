"""The device tables of resident adapters: the place in the pool of each tile of each (adapter, layer, op).

The buffers are fixed, so that a captured graph outlives every load and unload. Rows are written through pinned copies
on the caller's current stream; the caller orders that stream before the first step that names the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.adapter_image import ITEM_BYTES, KIND_A, KIND_B, OP_INDEX, OPS, TILE_ALIGN, layout
from loraplex_common.rank_limits import CUDA_MAX_RANK

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

NUM_OPS: Final = len(OPS)
MAX_SLICES: Final = 3
MAX_RANK: Final = CUDA_MAX_RANK  # kMaxRank, of one projection
MAX_STACKED_RANK: Final = MAX_SLICES * MAX_RANK  # largest stacked rank of an op
ENTRY_DTYPE: Final = np.dtype(
    [
        ("a_first", np.int32),
        ("a_step", np.int32),
        ("stacked_rank", np.int32),
        ("reserved", np.int32),
        ("rank", np.int32, MAX_SLICES),
        ("b_first", np.int32, MAX_SLICES),
        ("b_step", np.int32, MAX_SLICES),
        ("scaling", np.float32, MAX_SLICES),
        ("a_offset", np.int64),
        ("b_offset", np.int64, MAX_SLICES),
    ]
)
"""One OpEntry of csrc/lora_table.cuh, 96 bytes."""
_PLACE: Final = {name: (OP_INDEX[op], index) for op, names in OPS.items() for index, name in enumerate(names)}


class TableFullError(RuntimeError):
    """The tile table has no room for an adapter; the message holds the arithmetic."""


class RankLimitError(ValueError):
    """A module's rank exceeds what the kernels take; the message names layer, projection, rank and limit."""


def check_ranks(spec: AdapterSpec) -> None:
    """Refuse an adapter with a rank that the kernels cannot take.

    Raises:
        RankLimitError: If a module's rank exceeds `MAX_RANK`; ops of such modules stay within `MAX_STACKED_RANK`.
    """
    for module in spec.modules:
        if module.rank > MAX_RANK:
            raise RankLimitError(
                f"layer {module.layer}: rank {module.rank} ({module.projection}) exceeds the {MAX_RANK} that the CUDA "
                "kernels take for one projection"
            )


def make_entries(
    geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32]
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Return an adapter's ``[layers, 4]`` entries of `ENTRY_DTYPE` and its tiles' byte offsets in the pool.

    Tile numbers in the entries count from the adapter's first tile.

    Raises:
        ValueError: If pages are too few.
        RankLimitError: If a module's rank exceeds what the kernels take.
    """
    check_ranks(spec)
    plan = layout(geometry, spec.ranks)
    if len(pages) < plan.num_pages:
        raise ValueError(f"adapter {spec.digest[:12]} needs {plan.num_pages} pages, got {len(pages)}")
    tiles = plan.tiles
    entries = np.zeros((geometry.num_layers, NUM_OPS), dtype=ENTRY_DTYPE)
    firsts = np.flatnonzero(tiles["start"] == 0)
    first_a, first_b = firsts[tiles["kind"][firsts] == KIND_A], firsts[tiles["kind"][firsts] == KIND_B]
    at_a = tiles["layer"][first_a], tiles["op"][first_a]
    entries["a_first"][at_a], entries["a_step"][at_a] = first_a, tiles["cols"][first_a]
    entries["stacked_rank"][at_a] = tiles["rows"][first_a]
    at_b = tiles["layer"][first_b], tiles["op"][first_b], tiles["slice"][first_b]
    entries["b_first"][at_b], entries["b_step"][at_b] = first_b, tiles["rows"][first_b]
    entries["rank"][at_b] = tiles["cols"][first_b]
    for module in spec.modules:
        op, slice_index = _PLACE[module.projection]
        entries["scaling"][module.layer, op, slice_index] = module.scaling
    offsets = pages[tiles["page"]].astype(np.int64) * geometry.page_bytes + tiles["offset"]
    begins = _undivided(geometry, tiles, firsts, offsets)
    entries["a_offset"][at_a] = begins[tiles["kind"][firsts] == KIND_A]
    entries["b_offset"][at_b] = begins[tiles["kind"][firsts] == KIND_B]
    return entries, offsets


def _undivided(
    geometry: Geometry, tiles: NDArray[np.void], firsts: NDArray[np.intp], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return where each matrix begins if its tiles lie one after another in the pool, else -1.

    Args:
        geometry: For the element size.
        tiles: In stream order.
        firsts: First tile of each matrix.
        offsets: Of each tile in the pool, bytes.
    """
    sizes = tiles["rows"][firsts].astype(np.int64) * tiles["cols"][firsts] * ITEM_BYTES[geometry.dtype]
    strides = -(-sizes // TILE_ALIGN) * TILE_ALIGN
    counts = np.diff(np.append(firsts, len(tiles)))
    numbers = np.arange(len(tiles)) - np.repeat(firsts, counts)
    expected = np.repeat(offsets[firsts], counts) + numbers * np.repeat(strides, counts)
    undivided = np.logical_and.reduceat(offsets == expected, firsts) if len(firsts) else np.zeros(0, dtype=bool)
    return np.where(undivided, offsets[firsts], -1)


class RangeAllocator:
    """First-fit allocation of half-open ranges of ``[0, capacity)``."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._free = [(0, capacity)]
        self._used: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Return the start of a free range of ``size``.

        Raises:
            TableFullError: If no free range is that long.
        """
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                if size:
                    self._used[start] = size
                return start
        free = sum(stop - start for start, stop in self._free)
        raise TableFullError(
            f"{size} tiles do not fit: {free} of {self._capacity} are free, in {len(self._free)} ranges"
        )

    def release(self, start: int, size: int) -> None:
        """Give back what `allocate` returned."""
        if size == 0:
            return
        if self._used.pop(start, None) != size:
            raise RuntimeError(f"range [{start}, {start + size}) was not allocated")
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self._free, (start, start + size)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free and used ranges tile ``[0, capacity)``."""
        free, used = sum(stop - start for start, stop in self._free), sum(self._used.values())
        if free + used != self._capacity:
            raise RuntimeError(f"free {free} + used {used} != capacity {self._capacity}")


class AdapterTables:
    """Entries and tiles of up to ``max_adapters`` adapters.

    Attributes:
        geometry: Of adapter images.
        entries: uint8 ``[max_adapters, layers, 4, 96]`` on the device.
        tiles: int64 ``[tile_capacity]`` on the device; byte offsets in the pool.
        max_ranks: int32 ``[max_adapters, 4, 3]`` on the host; largest rank of each slice over the layers.
        max_stacked: int32 ``[max_adapters, 4]`` on the host; largest stacked rank over the layers.
    """

    def __init__(self, geometry: Geometry, *, max_adapters: int, tile_capacity: int, device: torch.device) -> None:
        shape = (max_adapters, geometry.num_layers, NUM_OPS, ENTRY_DTYPE.itemsize)
        self.geometry = geometry
        self._allocator = RangeAllocator(tile_capacity)
        self._ranges: dict[int, tuple[int, int]] = {}
        self._pinned = device.type == "cuda"
        spare = ENTRY_DTYPE.itemsize  # kernels prefetch the entry behind the one they read
        storage = torch.zeros(int(np.prod(shape)) + spare, dtype=torch.uint8, device=device)
        self.entries = storage[:-spare].view(shape)
        self.tiles = torch.zeros(tile_capacity, dtype=torch.int64, device=device)
        self.max_ranks = np.zeros((max_adapters, NUM_OPS, MAX_SLICES), dtype=np.int32)
        self.max_stacked = np.zeros((max_adapters, NUM_OPS), dtype=np.int32)

    @property
    def entry_stride(self) -> int:
        """Entries from one adapter to the next."""
        return self.geometry.num_layers * NUM_OPS

    def entry_address(self, layer: int, op: str) -> int:
        """Return the device address of adapter 0's entry for a layer and op."""
        return self.entries.data_ptr() + (layer * NUM_OPS + OP_INDEX[op]) * ENTRY_DTYPE.itemsize

    def bind(self, index: int, spec: AdapterSpec, pages: NDArray[np.int32]) -> None:
        """Write an adapter's rows on the current stream.

        Raises:
            RuntimeError: If the index is bound.
            ValueError: If the adapter does not fit its pages or the kernels; nothing is bound then.
            TableFullError: If the tile table is full; nothing is bound then.
        """
        if index in self._ranges:
            raise RuntimeError(f"index {index} is bound already")
        entries, offsets = make_entries(self.geometry, spec, pages)
        start = self._allocator.allocate(len(offsets))
        entries["a_first"] += start
        entries["b_first"] += start
        self._ranges[index] = (start, len(offsets))
        self.max_ranks[index] = entries["rank"].max(axis=0)
        self.max_stacked[index] = entries["stacked_rank"].max(axis=0)
        self._upload(self.tiles[start : start + len(offsets)], torch.from_numpy(offsets))
        self._upload(self.entries[index], torch.from_numpy(entries.view(np.uint8).reshape(self.entries.shape[1:])))

    def unbind(self, index: int) -> None:
        """Forget an adapter; its rows on the device stay until the index is bound again, but no step names them.

        Raises:
            KeyError: If the index is not bound.
        """
        self._allocator.release(*self._ranges.pop(index))
        self.max_ranks[index] = 0
        self.max_stacked[index] = 0

    def check_integrity(self) -> None:
        """Raise RuntimeError if the tile table's accounts do not add up."""
        self._allocator.check_integrity()

    def _upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source.pin_memory() if self._pinned else source, non_blocking=self._pinned)
