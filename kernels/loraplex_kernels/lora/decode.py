"""LoRA of decode rows: shrink, then expand, which adds to an output or writes a delta that another kernel adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import torch

from loraplex_kernels.lora.items import (
    GROUP_INTS,
    ITEM_INTS,
    ItemBuilder,
    ItemRanges,
    OpShape,
    header_ints,
    range_index,
)
from loraplex_kernels.lora.tables import PLAIN_MAX_RANK
from loraplex_kernels.params import ExpandAddParams, LoraTables, ShrinkParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraplex_kernels.lora.outside_tables import OpTables
    from loraplex_kernels.module import Kernel, KernelLibrary
    from loraplex_kernels.params import ExpandParams

SHRINK_BLOCK: Final = 256
EXPAND_BLOCK: Final = 128
INT_BYTES: Final = 4


class StepItems:
    """A step's items on the device, in fixed buffers.

    Groups lie at a fixed place, and items behind the room for ``max_groups``, so that graphs stay valid.
    """

    def __init__(
        self, *, num_ops: int, max_rows: int, max_items: int, device: torch.device, group_ints: int = GROUP_INTS
    ) -> None:
        self._max_groups, self._max_items, self._group_ints = max_rows, max_items, group_ints
        self._header_ints = header_ints(num_ops)
        self._items_at = self._header_ints + max_rows * group_ints
        size = self._items_at + max_items * ITEM_INTS
        self.buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"

    def count(self, built: ItemRanges) -> int:
        """Return the number of a step's items."""
        return (len(built.buffer) - self._header_ints - built.num_groups * self._group_ints) // ITEM_INTS

    def upload(self, built: ItemRanges) -> None:
        """Copy a step's items to the device on the current stream.

        Raises:
            ValueError: If there are more items than the buffers hold.
        """
        items = self.count(built)
        if built.num_groups > self._max_groups or items > self._max_items:
            raise ValueError(
                f"{built.num_groups} groups, {items} items exceed {self._max_groups} and {self._max_items}"
            )
        host = torch.from_numpy(built.buffer)
        host = host.pin_memory() if self._pinned else host
        head = self._header_ints + built.num_groups * self._group_ints
        self.buffer[:head].copy_(host[:head], non_blocking=self._pinned)
        self.buffer[self._items_at : self._items_at + items * ITEM_INTS].copy_(host[head:], non_blocking=self._pinned)

    def fill(self, lora: LoraTables, op_index: int, *, expand: bool) -> None:
        """Point a kernel's parameters at the items of an op."""
        base = self.buffer.data_ptr()
        lora.range = base + 2 * INT_BYTES * range_index(op_index, expand=expand)
        lora.groups = base + self._header_ints * INT_BYTES
        lora.items = base + self._items_at * INT_BYTES


class LoraDecode:
    """The LoRA kernels of decode rows.

    Args:
        library: Compiles and loads them.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops, as the item builder has them.
        max_rows: Most rows of a step.
        max_items: Most items of a step.
    """

    DEFINES: ClassVar[tuple[str, ...]] = ()
    EXPAND: ClassVar[str] = "lora_expand"
    RANKS: ClassVar[int] = PLAIN_MAX_RANK

    def __init__(
        self,
        library: KernelLibrary,
        tables: OpTables,
        pool: torch.Tensor,
        shapes: tuple[OpShape, ...],
        *,
        max_rows: int,
        max_items: int,
    ) -> None:
        item_bytes = 2 if library.dtype == torch.bfloat16 else 4
        self.builder = ItemBuilder(shapes, item_bytes)
        self.items = StepItems(num_ops=len(shapes), max_rows=max_rows, max_items=max_items, device=library.device)
        self._library, self._tables, self._shapes = library, tables, shapes
        self._kept = (pool,)  # kept alive: the kernels have its address
        planes = max(shape.num_planes for shape in shapes)
        self.scratch_shape = (planes, max_rows, self.RANKS * max(len(shape.outputs) for shape in shapes))
        self._shrink = library.load("lora_shrink", ShrinkParams(), SHRINK_BLOCK, defines=self.DEFINES)
        self._expand = library.load(self.EXPAND, ExpandAddParams(), EXPAND_BLOCK, defines=self.DEFINES)
        kernels: tuple[Kernel[ShrinkParams] | Kernel[ExpandAddParams], ...] = (self._shrink, self._expand)
        for kernel in kernels:
            kernel.params.lora.pool = pool.data_ptr()
            kernel.params.lora.tiles = tables.tiles.data_ptr()
            kernel.params.lora.entry_stride = tables.entry_stride

    def new_scratch(self) -> torch.Tensor:
        """Allocate an h: fp32 ``[planes, max_rows, stacked rank]``; one for each op that is in flight at a time."""
        return torch.empty(self.scratch_shape, dtype=torch.float32, device=self._library.device)

    def prepare(self, adapters: NDArray[np.int32], rows: NDArray[np.int32] | None = None) -> ItemRanges:
        """Build the items of a step and copy them to the device on the current stream."""
        built = self.builder.build(adapters, self._tables.max_ranks, self._tables.max_stacked, rows)
        self.items.upload(built)
        return built

    def shrink(self, layer: int, op: str, x: torch.Tensor, h: torch.Tensor, grid: int) -> None:
        """Compute ``h[plane][t] = x[t, chunk] @ A[:, chunk].T``.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            x: ``[tokens, in_features]``.
            h: From `new_scratch`.
            grid: CTAs; they stride over the items.
        """
        params, index = self._shrink.params, self._tables.op_index(layer, op)
        shape = self._shapes[index]
        params.x = self._library.check("x", x, self._library.dtype, -1, shape.columns)
        self._fill_lora(params.lora, layer, index, expand=False)
        params.h, params.h_plane, params.h_stride = h.data_ptr(), h.stride(0), h.stride(1)
        params.columns, params.plane_columns = shape.columns, shape.plane_columns
        self._shrink.launch(grid)

    def expand_add(self, layer: int, op: str, h: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, grid: int) -> None:
        """Compute ``y[t] += scaling * scale[t] * sum(h[:, t]) @ B.T`` for rows with an adapter.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            h: What `shrink` wrote.
            scale: fp32 ``[tokens]``.
            y: ``[tokens, out_features of all slices]``, or as wide as the shape says, updated in place.
            grid: CTAs.
        """
        params, index = self._expand.params, self._tables.op_index(layer, op)
        shape = self._shapes[index]
        params.y = self._library.check("y", y, self._library.dtype, -1, shape.row_columns)
        params.delta, params.accumulates = None, True
        self._launch_expand(layer, index, h, scale, grid)

    def expand_delta(
        self, layer: int, op: str, h: torch.Tensor, scale: torch.Tensor, delta: torch.Tensor, grid: int
    ) -> None:
        """Compute ``delta[t] = scaling * scale[t] * sum(h[:, t]) @ B.T`` for all rows of the step, zeros without an adapter.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops; its shape must be complete.
            h: What `shrink` wrote.
            scale: fp32 ``[tokens]``.
            delta: ``[tokens, out_features of all slices]``; fp32 for a kernel that adds it later, the element type for a
                product that accumulates onto it.
            grid: CTAs.

        Raises:
            ValueError: If the op's shape is not complete.
        """
        params, index = self._expand.params, self._tables.op_index(layer, op)
        shape = self._shapes[index]
        if not shape.complete:
            raise ValueError(f"items of {op} leave outputs out that no adapter adapts")
        address = self._library.check("delta", delta, delta.dtype, -1, shape.slice_begin[-1])
        is_element = delta.dtype == self._library.dtype
        if not is_element and delta.dtype != torch.float32:
            raise ValueError(f"delta: {self._library.dtype} or torch.float32, not {delta.dtype}")
        params.y, params.delta = (address, None) if is_element else (None, address)
        params.accumulates = False
        self._launch_expand(layer, index, h, scale, grid)

    def _launch_expand(self, layer: int, op_index: int, h: torch.Tensor, scale: torch.Tensor, grid: int) -> None:
        params, shape = self._expand.params, self._shapes[op_index]
        params.y_stride = shape.row_columns
        self._fill_lora(params.lora, layer, op_index, expand=True)
        self._fill_expand(params.expand, shape, h, scale)
        self._expand.launch(grid)

    def _fill_lora(self, lora: LoraTables, layer: int, op_index: int, *, expand: bool) -> None:
        lora.entries = self._tables.entry_address(layer, op_index)
        self.items.fill(lora, op_index, expand=expand)

    def _fill_expand(self, expand: ExpandParams, shape: OpShape, h: torch.Tensor, scale: torch.Tensor) -> None:
        expand.h, expand.h_plane, expand.h_stride = h.data_ptr(), h.stride(0), h.stride(1)
        expand.scale = self._library.check("scale", scale, torch.float32, -1)
        expand.num_planes = shape.num_planes
        expand.slice_begin[:] = shape.kernel_slice_begin
