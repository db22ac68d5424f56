"""Attention of a step: decode rows and prefill chunks by their kernels, in fp32 all by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.prefill import AttentionPrefill
from loraplex_kernels.attention.scalar import AttentionScalar

if TYPE_CHECKING:
    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

    from loraplex_engine.runners.cuda.step_input import StepInputs


class PagedAttention:
    """Attention of layers with one size of window.

    Args:
        library: Kernels.
        layout: Place of K and V in pages, and the window.
        max_rows: Decode rows of the largest step.
        max_context: Longest sequence, in tokens.
        scale: Factor of the scores.
        softcap: Their cap, if they have one.
    """

    def __init__(
        self,
        library: KernelLibrary,
        layout: KvLayout,
        *,
        max_rows: int,
        max_context: int,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        self._scalar: AttentionScalar | None = None
        if library.dtype == torch.float32:
            self._scalar = AttentionScalar(library, layout, scale=scale, softcap=softcap)
            return
        self._decode = AttentionDecode(
            library,
            layout,
            max_rows=max_rows,
            max_context=max_context,
            scale=scale,
            softcap=softcap,
        )
        self._prefill = AttentionPrefill(library, layout, scale=scale, softcap=softcap)

    def launch(self, layer: int, pool: Tensor, qkv: Tensor, step: StepInputs, num_decode: int, out: Tensor) -> None:
        """Attend from each token; the first ``num_decode`` are decode rows, the rest in the step's tiles."""
        if self._scalar is not None:
            self._scalar.launch(layer, pool, qkv, step.block_tables, step.sequences, step.positions, out)
            return
        if num_decode:
            self._decode.launch(
                layer,
                pool,
                qkv[:num_decode],
                step.block_tables[:num_decode],
                step.contexts[:num_decode],
                out[:num_decode],
            )
        if step.tiles.shape[0]:
            self._prefill.launch(layer, pool, qkv, step.block_tables, step.tiles, out)
