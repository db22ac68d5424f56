"""FLoRA: ``y = sum over r of B_r * (W (A_r * x))`` in the place of the base's product, for rows whose adapters have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from loraplex_common.flora import FLORA, MAX_FLORA_RANK

from loraplex_kernels.flora_params import FloraScaleParams, FloraSumParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.lora.items import OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.params import PartTables

BLOCK: Final = 256
ROW_INTS: Final = 4  # FloraRow
INT_BYTES: Final = 4
MAX_PASSES: Final = 1024
"""Rows of one product of FLoRA; a step with more passes reads W once more. From some 200 rows on a product in bf16 costs its
arithmetic and not its bytes, so more room would win nothing."""


Product: TypeAlias = Callable[[int, int, torch.Tensor, torch.Tensor], None]
"""Computes ``out[:] = x @ W[first:last].T`` of (first, last, x, out)."""


class Chunk(NamedTuple):
    """Rows whose passes go through W together: ``[first, last)`` of those with FLoRA, and the number of their passes."""

    first: int
    last: int
    num_passes: int


def cut_rows(ranks: NDArray[np.int32], max_passes: int) -> tuple[NDArray[np.int32], list[Chunk]]:
    """Return each row's first pass within its chunk, and the chunks.

    Args:
        ranks: int32 ``[rows]``; passes of each row, at least one and at most ``max_passes``.
        max_passes: Passes of a chunk.
    """
    firsts, chunks = np.zeros(len(ranks), dtype=np.int32), list[Chunk]()
    begin, ends = 0, np.cumsum(ranks, dtype=np.int64)
    while begin < len(ranks):
        before = int(ends[begin - 1]) if begin else 0
        last = int(np.searchsorted(ends, before + max_passes, side="right"))
        firsts[begin:last] = ends[begin:last] - ranks[begin:last] - before
        chunks.append(Chunk(begin, last, int(ends[last - 1]) - before))
        begin = last
    return firsts, chunks


class LoraFlora:
    """The kernels of FLoRA with the rows of one step, in fixed buffers.

    A pass is one row of a product with W, whatever the row and rank that it belongs to, so W is read once for up to
    ``max_passes`` of them. Rows of a slice that no adapter of the step adapts take no part.

    Args:
        library: Compiles and loads them.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops.
        max_rows: Most rows of a step.
        max_passes: Rows of the two scratches.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: torch.Tensor,
        shapes: tuple[OpShape, ...],
        *,
        max_rows: int,
        max_passes: int = MAX_PASSES,
    ) -> None:
        self._library, self._tables, self._shapes = library, tables, shapes
        self._kept = (pool,)  # kept alive: the kernels have its address
        self._max_passes = max(min(max_passes, max_rows * MAX_FLORA_RANK), MAX_FLORA_RANK)
        self._scaled, self._products = (
            torch.empty(self._max_passes * widest, dtype=library.dtype, device=library.device)
            for widest in (max(shape.columns for shape in shapes), max(max(shape.outputs) for shape in shapes))
        )
        self.buffer = torch.zeros(max_rows * ROW_INTS, dtype=torch.int32, device=library.device)
        self._pinned = library.device.type == "cuda"
        self._chunks = list[Chunk]()
        self._slices = np.zeros((len(shapes), tables.max_flora.shape[2]), dtype=np.bool_)
        self._scale = library.load("lora_flora_scale", FloraScaleParams(), BLOCK)
        self._sum = library.load("lora_flora_sum", FloraSumParams(), BLOCK)
        self._block_items = BLOCK * 16 // library.dtype.itemsize
        common: tuple[PartTables, ...] = (self._scale.params.tables, self._sum.params.tables)
        for each in common:
            each.pool, each.tiles = pool.data_ptr(), tables.tiles.data_ptr()
            each.entry_stride = tables.entry_stride

    def prepare(self, adapters: NDArray[np.int32]) -> None:
        """Send a step's rows to the device on the current stream.

        Args:
            adapters: int32 ``[rows]``; adapter of each row, -1 for none.

        Raises:
            ValueError: If more rows have FLoRA than the buffer holds.
        """
        rows = np.flatnonzero((adapters >= 0) & self._tables.has_part[FLORA][adapters].any(axis=1)).astype(np.int32)
        used = adapters[rows]
        if len(rows) * ROW_INTS > len(self.buffer):
            raise ValueError(f"{len(rows)} rows with FLoRA exceed {len(self.buffer) // ROW_INTS}")
        ranks = self._tables.max_flora[used]
        self._slices = ranks.max(axis=0, initial=0) > 0
        firsts, self._chunks = cut_rows(ranks.max(axis=(1, 2), initial=0), self._max_passes)
        host = torch.from_numpy(np.stack([rows, used, firsts, np.zeros_like(rows)], axis=1).reshape(-1))
        self.buffer[: len(host)].copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)

    def replace(
        self,
        layer: int,
        op: str,
        product: Product,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """Write ``y[t] = sum over r of B_r * (W (A_r * x[t])) + bias`` to slices with FLoRA of the step's rows.

        Each pass is rounded to the element type, as any product is; their sum is fp32 and rounded once.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            product: Multiplies with the op's W.
            bias: The base's ``[out_features of all slices]``.
            x: ``[tokens, in_features]``.
            y: ``[tokens, out_features of all slices]``; other rows and slices stay as they are.
        """
        index = self._tables.op_index(layer, op)
        shape, columns = self._shapes[index], self._shapes[index].columns
        scale, total = self._scale.params, self._sum.params
        scale.x = self._library.check("x", x, self._library.dtype, -1, columns)
        to = self._library.check("y", y, self._library.dtype, -1, shape.slice_begin[-1])
        base = None if bias is None else self._library.check("bias", bias, self._library.dtype, shape.slice_begin[-1])
        scale.entries = total.entries = self._tables.entry_address(layer, index, FLORA)
        scale.columns, total.width = columns, shape.slice_begin[-1]
        for part in np.flatnonzero(self._slices[index]).tolist():
            begin, outputs = shape.slice_begin[part], shape.outputs[part]
            scale.slice = total.slice = part
            total.outputs = outputs
            total.y = to + begin * y.itemsize
            total.bias = None if base is None else base + begin * y.itemsize
            self._pass_slice(product, begin, outputs)

    def _pass_slice(self, product: Product, begin: int, outputs: int) -> None:
        """Go through one slice of W with each chunk's rows."""
        columns = self._scale.params.columns
        for first, last, num_passes in self._chunks:
            scaled = self._scaled[: num_passes * columns].view(num_passes, columns)
            products = self._products[: num_passes * outputs].view(num_passes, outputs)
            rows = self.buffer.data_ptr() + first * ROW_INTS * INT_BYTES
            self._scale.params.rows = self._sum.params.rows = rows
            self._scale.params.out = self._library.check("scaled", scaled, self._library.dtype, -1, columns)
            self._scale.launch(-(-columns // self._block_items), last - first)
            product(begin, begin + outputs, scaled, products)
            self._sum.params.products = self._library.check("products", products, self._library.dtype, -1, outputs)
            self._sum.launch(-(-outputs // self._block_items), last - first)
