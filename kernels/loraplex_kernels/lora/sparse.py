"""Sparse deltas: ``y += S x`` for rows whose adapters have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from loraplex_common.image_geometry import ITEM_BYTES
from loraplex_common.sparse_delta import SPARSE_DELTA

from loraplex_kernels.lora.items import GROUP_INTS, HEADER_STEP, ITEM_INTS
from loraplex_kernels.lora.sparse_items import build_sparse
from loraplex_kernels.params import SparseParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.lora.items import OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import Kernel, KernelLibrary

WARP: Final = 32
OUTPUTS: Final = 64  # kOutputs
ITEMS: Final = 4  # kItems
ITEM_BYTES_KEPT: Final = 16 + 24 + 3 * (32 * 8 + 8)  # Item, Slice and three Tiles of 32
TOKENS: Final = (4, 2, 1)
X_BYTES: Final = 48 * 1024
"""Most shared memory for several rows' x, so that two CTAs fit a multiprocessor."""
SM_BYTES: Final = 220 * 1024
INT_BYTES: Final = 4


class SparseVariant(NamedTuple):
    """How the kernel is built; the default is what a model runs with, others are for measurements.

    Attributes:
        threads: Threads of a CTA.
        ctas: CTAs that share a multiprocessor's registers.
        ahead: Runs of 8 non-zeros that a lane loads ahead.
        is_wide: x of one row is fp32 in shared memory, where several rows' would fit.
    """

    threads: int = 384
    ctas: int = 2
    ahead: int = 2
    is_wide: bool = True

    @classmethod
    def parse(cls, text: str) -> SparseVariant:
        """Return the variant of ``threads x CTAs x ahead x wide``, such as ``384x2x2x1``.

        Raises:
            ValueError: If the text is no such thing.
        """
        threads, ctas, ahead, is_wide = (int(number) for number in text.split("x"))
        return cls(threads, ctas, ahead, bool(is_wide))

    def __str__(self) -> str:
        return f"{self.threads}x{self.ctas}x{self.ahead}x{self.is_wide:d}"

    def ahead_of(self, item_bytes: int) -> int:
        """Return the runs that a lane loads ahead: of fp32, whose runs take half as many registers again, one."""
        return self.ahead if item_bytes <= 2 else 1

    def defines(self, columns: int, item_bytes: int) -> tuple[str, ...]:
        """Return the macros of a kernel for that many columns."""
        return (
            f"COLUMNS={columns}",
            f"TOKENS={rows_at_once(columns, item_bytes)}",
            f"THREADS={self.threads}",
            f"CTAS={self.ctas}",
            f"AHEAD={self.ahead_of(item_bytes)}",
            f"WIDE={self.is_wide:d}",
            f"SHARED_BYTES={shared_bytes(columns, item_bytes, self)}",
        )


DEFAULT_VARIANT: Final = SparseVariant()


def rows_at_once(columns: int, item_bytes: int) -> int:
    """Return how many rows of that many columns share a load of values."""
    return next((count for count in TOKENS if count * columns * item_bytes <= X_BYTES), 1)


def shared_bytes(columns: int, item_bytes: int, variant: SparseVariant = DEFAULT_VARIANT) -> int:
    """Return the size of the kernel's Shared."""
    tokens, sums = rows_at_once(columns, item_bytes), 128 * variant.ahead_of(item_bytes)
    warp_bytes = sums * 4 + (tokens + 1) * (OUTPUTS + 1) * INT_BYTES + sums
    x_bytes = -(-tokens * columns * item_bytes // 16) * 16
    warps_bytes = -(-(variant.threads // WARP) * warp_bytes // 16) * 16
    return x_bytes + warps_bytes + ITEMS * ITEM_BYTES_KEPT


def ctas_per_sm(columns: int, item_bytes: int, variant: SparseVariant = DEFAULT_VARIANT) -> int:
    """Return how many CTAs fit a multiprocessor of 227 KiB."""
    return max(1, min(variant.ctas, SM_BYTES // (shared_bytes(columns, item_bytes, variant) + 1024)))


class LoraSparse:
    """The kernel of sparse deltas with the items of one step, in fixed buffers.

    Args:
        library: Compiles and loads it.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops.
        max_rows: Most rows of a step.
        num_sms: Multiprocessors of the device.
        variant: How the kernel is built.

    Raises:
        ValueError: If tiles are no power of two of bytes.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: torch.Tensor,
        shapes: tuple[OpShape, ...],
        *,
        max_rows: int,
        num_sms: int,
        variant: SparseVariant = DEFAULT_VARIANT,
    ) -> None:
        self._library, self._tables, self._shapes = library, tables, shapes
        self._kept = (pool,)  # kept alive: the kernels have its address
        item_bytes, tile_bytes = ITEM_BYTES[tables.geometry.dtype], tables.geometry.tile_bytes
        if tile_bytes & (tile_bytes - 1):
            raise ValueError(f"tiles of {tile_bytes} bytes: kernels of sparse deltas take powers of two")
        self._tokens = [rows_at_once(shape.columns, item_bytes) for shape in shapes]
        self._variant = variant
        self._grids = [num_sms * ctas_per_sm(shape.columns, item_bytes, variant) for shape in shapes]
        self._kernels = [self._load(pool, columns, item_bytes) for columns in (shape.columns for shape in shapes)]
        self._ranges_at = np.cumsum([0, *(grid + 1 for grid in self._grids)])
        self._groups_at = -(-int(self._ranges_at[-1]) // HEADER_STEP) * HEADER_STEP
        self._max_groups = max_rows
        self._items_at = self._groups_at + max_rows * GROUP_INTS
        slices = sum(len(shape.outputs) for shape in shapes)
        self._max_items = sum(self._grids) + slices * max_rows
        size = self._items_at + self._max_items * ITEM_INTS
        self.buffer = torch.zeros((1, size), dtype=torch.int32, device=library.device)
        self._pinned = library.device.type == "cuda"

    def reserve_passes(self, num_passes: int) -> None:
        """Make room for the items of that many passes at a time: rows may have a sparse delta of each."""
        self.buffer = self.buffer.new_zeros((num_passes, self.buffer.shape[1]))

    def _load(self, pool: torch.Tensor, columns: int, item_bytes: int) -> Kernel[SparseParams]:
        variant = self._variant
        kernel = self._library.load(
            "lora_sparse",
            SparseParams(),
            variant.threads,
            defines=variant.defines(columns, item_bytes),
            shared_bytes=shared_bytes(columns, item_bytes, variant),
        )
        tile_bits = self._tables.geometry.tile_bytes.bit_length() - 1
        params = kernel.params
        params.lora.pool, params.lora.tiles = pool.data_ptr(), self._tables.tiles.data_ptr()
        params.lora.entry_stride = self._tables.entry_stride
        params.value_shift = tile_bits - (item_bytes.bit_length() - 1)
        params.column_shift, params.start_shift = tile_bits - 1, tile_bits - 2
        return kernel

    def prepare(self, adapters: NDArray[np.int32], rows: NDArray[np.int32] | None = None, *, number: int = 0) -> None:
        """Build a step's items and copy them to the device on the current stream.

        Args:
            adapters: int32 ``[N]``; adapter of each row, -1 for none.
            rows: int32 ``[N]``; the rows' numbers in activations, 0..N-1 if unset.
            number: The pass, below what was reserved.
        """
        numbers = np.arange(len(adapters), dtype=np.int32) if rows is None else rows
        chosen = np.flatnonzero((adapters >= 0) & self._tables.has_part[SPARSE_DELTA][adapters].any(axis=1))
        work = build_sparse(
            adapters[chosen], numbers[chosen], self._tables.max_nonzeros, self._shapes, self._tokens, self._grids
        )
        if len(work.groups) > self._max_groups or len(work.items) > self._max_items:
            raise ValueError(
                f"{len(work.groups)} groups, {len(work.items)} items exceed {self._max_groups} and {self._max_items}"
            )
        head = np.zeros(self._groups_at + work.groups.size, dtype=np.int32)
        head[: self._ranges_at[-1]] = np.concatenate(work.ranges)
        head[self._groups_at :] = work.groups.reshape(-1)
        buffer = self.buffer[number]
        self._send(buffer[: len(head)], head)
        self._send(buffer[self._items_at : self._items_at + work.items.size], work.items.reshape(-1))

    def add(
        self, layer: int, op: str, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, *, number: int = 0
    ) -> None:
        """Compute ``y[t] += scaling * scale[t] * S x[t]`` for the rows of the step's items.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            x: ``[tokens, in_features]``.
            y: ``[tokens, out_features of all slices]``, updated in place.
            scale: fp32 ``[tokens]``.
            number: The pass.
        """
        index = self._tables.op_index(layer, op)
        shape, kernel = self._shapes[index], self._kernels[index]
        params, width = kernel.params, shape.slice_begin[-1]
        params.x = self._library.check("x", x, self._library.dtype, -1, shape.columns)
        params.y = self._library.check("y", y, self._library.dtype, -1, width)
        params.scale = self._library.check("scale", scale, torch.float32, -1)
        params.slice_begin[:] = shape.kernel_slice_begin
        params.width = width
        base = self.buffer.data_ptr() + INT_BYTES * number * self.buffer.stride(0)
        params.lora.entries = self._tables.entry_address(layer, index, SPARSE_DELTA)
        params.lora.range = base + INT_BYTES * int(self._ranges_at[index])
        params.lora.groups = base + INT_BYTES * self._groups_at
        params.lora.items = base + INT_BYTES * self._items_at
        kernel.launch(self._grids[index])

    def _send(self, target: torch.Tensor, source: NDArray[np.int32]) -> None:
        host = torch.from_numpy(source)
        target.copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)
