"""The vectors of adapters: e scales a product's input where it lies, c and b finish its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR

from loraplex_kernels.params import FinishParams, ScaleInputParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.lora.items import OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.params import PartTables

BLOCK: Final = 256
NO_ADAPTER: Final = -1


class RowAdapters:
    """The adapter of each row of a step on the device, in a fixed buffer.

    Attributes:
        buffer: int32 ``[max_rows]``; -1 without an adapter, and behind the step's rows.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.buffer = torch.full((max_rows,), NO_ADAPTER, dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"

    def upload(self, adapters: NDArray[np.int32]) -> None:
        """Send a step's adapters, int32 ``[rows]``, on the current stream.

        Raises:
            ValueError: If there are more rows than the buffer holds.
        """
        if len(adapters) > len(self.buffer):
            raise ValueError(f"{len(adapters)} rows exceed {len(self.buffer)}")
        host = np.full(len(self.buffer), NO_ADAPTER, dtype=np.int32)
        host[: len(adapters)] = adapters
        source = torch.from_numpy(host)
        self.buffer.copy_(source.pin_memory() if self._pinned else source, non_blocking=self._pinned)


class LoraVectors:
    """The pointwise kernels of e, c and b.

    Args:
        library: Compiles and loads them.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops.
    """

    def __init__(
        self, library: KernelLibrary, tables: AdapterTables, pool: torch.Tensor, shapes: tuple[OpShape, ...]
    ) -> None:
        self._library, self._tables, self._shapes = library, tables, shapes
        self._kept = (pool,)  # kept alive: the kernels have its address
        self._finish = library.load("lora_finish", FinishParams(), BLOCK)
        self._scale = library.load("lora_scale_input", ScaleInputParams(), BLOCK)
        self._block_items = BLOCK * 16 // library.dtype.itemsize
        common: tuple[PartTables, ...] = (self._finish.params.tables, self._scale.params.tables)
        for each in common:
            each.pool, each.tiles = pool.data_ptr(), tables.tiles.data_ptr()
            each.entry_stride = tables.entry_stride

    def scale_input(self, layer: int, op: str, x: torch.Tensor, rows: RowAdapters) -> None:
        """Compute ``x[t] = e * x[t]`` in place, for rows whose adapter has e.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            x: ``[tokens, in_features]``.
            rows: The tokens' adapters.
        """
        params, index = self._scale.params, self._tables.op_index(layer, op)
        columns = self._shapes[index].columns
        params.x = self._library.check("x", x, self._library.dtype, -1, columns)
        params.columns = columns
        params.tables.adapters = self._library.check("adapters", rows.buffer, torch.int32, -1)
        params.entries = self._tables.entry_address(layer, index, IN_VECTOR)
        self._scale.launch(-(-columns // self._block_items), x.shape[0])

    def finish(
        self,
        layer: int,
        op: str,
        y: torch.Tensor,
        rows: RowAdapters,
        scale: torch.Tensor,
        base_bias: torch.Tensor | None = None,
    ) -> None:
        """Compute ``y[t] = c * (y[t] - base_bias) + base_bias + scale[t] * b`` in place, for rows whose adapter has c or b.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            y: ``[tokens, out_features of all slices]``; the product, the base's bias and the pairs.
            rows: The tokens' adapters.
            scale: fp32 ``[tokens]``.
            base_bias: ``[out_features of all slices]``; c that scales the base's bias leaves it where it is.
        """
        params, index = self._finish.params, self._tables.op_index(layer, op)
        shape = self._shapes[index]
        width = shape.slice_begin[-1]
        params.y = self._library.check("y", y, self._library.dtype, -1, width)
        params.scale = self._library.check("scale", scale, torch.float32, -1)
        params.base_bias = None
        if base_bias is not None:
            params.base_bias = self._library.check("base_bias", base_bias, self._library.dtype, width)
        params.tables.adapters = self._library.check("adapters", rows.buffer, torch.int32, -1)
        params.scales = self._tables.entry_address(layer, index, OUT_VECTOR)
        params.biases = self._tables.entry_address(layer, index, BIAS)
        params.slice_begin[:] = shape.kernel_slice_begin
        params.width = width
        self._finish.launch(-(-width // self._block_items), y.shape[0])
