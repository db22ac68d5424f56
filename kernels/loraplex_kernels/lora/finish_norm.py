"""c and b of o's and down's output, the sum with the residual stream, and its norm, in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_common.vectors import BIAS, OUT_VECTOR

from loraplex_kernels.row_params import FinishNormParams

if TYPE_CHECKING:
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.lora.vectors import RowAdapters
    from loraplex_kernels.module import KernelLibrary


class FinishNorm:
    """What `LoraVectors.finish` and then `RmsNorm` compute, for ops with one slice as wide as the residual stream.

    A kernel of its own for c costs a decode step more in launches than in bytes: it cannot begin before the product behind which
    it stands has ended.

    Args:
        library: Compiles and loads it.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        hidden_size: Width of the residual stream.
        build: Macros and block size of a norm of such rows, `rms_norm_build`.
        eps: Added to the mean of the squares.

    Attributes:
        num_layers: Decoder layers; behind the last one's down stands a norm of other rows, which this is not.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: torch.Tensor,
        *,
        hidden_size: int,
        build: tuple[tuple[str, ...], int],
        eps: float,
    ) -> None:
        self._library, self._tables, self._hidden = library, tables, hidden_size
        self.num_layers = tables.geometry.num_decoder_layers
        self._kept = (pool,)  # kept alive: the kernel has its address
        defines, block = build
        self._kernel = library.load("lora_finish_norm", FinishNormParams(eps=eps), block, defines=defines)
        common = self._kernel.params.tables
        common.pool, common.tiles, common.entry_stride = pool.data_ptr(), tables.tiles.data_ptr(), tables.entry_stride

    def launch(
        self,
        layer: int,
        op: str,
        y: torch.Tensor,
        rows: RowAdapters,
        scale: torch.Tensor,
        base_bias: torch.Tensor | None,
        *,
        residual: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Compute ``residual += c * (y - base_bias) + base_bias + scale * b``, and ``out``, its norm.

        Args:
            layer: Decoder layer.
            op: ``o`` or ``down``.
            y: ``[tokens, hidden]``; the product, the base's bias and the pairs.
            rows: The tokens' adapters.
            scale: fp32 ``[tokens]``.
            base_bias: ``[hidden]``; None for none.
            residual: ``[tokens, hidden]``, updated in place.
            weight: ``[hidden]``; of the norm.
            out: ``[tokens, hidden]``.
        """
        params, check, dtype, hidden = self._kernel.params, self._library.check, self._library.dtype, self._hidden
        index = self._tables.op_index(layer, op)
        params.y = check("y", y, dtype, -1, hidden)
        params.scale = check("scale", scale, torch.float32, -1)
        params.base_bias = None if base_bias is None else check("base_bias", base_bias, dtype, hidden)
        params.tables.adapters = check("adapters", rows.buffer, torch.int32, -1)
        params.scales = self._tables.entry_address(layer, index, OUT_VECTOR)
        params.biases = self._tables.entry_address(layer, index, BIAS)
        params.residual = check("residual", residual, dtype, y.shape[0], hidden)
        params.weight = check("weight", weight, dtype, hidden)
        params.out = check("out", out, dtype, y.shape[0], hidden)
        self._kernel.launch(y.shape[0])
