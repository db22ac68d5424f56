"""Paged causal attention in scalar fp32 arithmetic, for fp32 models and as a second opinion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_kernels.attention.paged_kv import softcap_defines
from loraplex_kernels.params import AttentionScalarParams

if TYPE_CHECKING:
    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary

WARPS = 4


class AttentionScalar:
    """``out = softmax(scale * q K^T) V`` for any mix of decode rows and prefill chunks, one warp per (token, head).

    Args:
        library: Compiles and loads the kernel.
        layout: Place of K and V in pages; heads of 64, 80, 96, 128 or 256.
        scale: Factor on ``q k``; None for 1 / sqrt(head_dim).
        softcap: Scores are ``softcap * tanh(scale * q k / softcap)``; None for plain ones.
    """

    def __init__(
        self, library: KernelLibrary, layout: KvLayout, *, scale: float | None = None, softcap: float | None = None
    ) -> None:
        self._library, self._layout, self._scale = library, layout, scale
        defines = (f"HEAD_DIM={layout.head_dim}", *layout.kv_defines, *softcap_defines(softcap))
        self._kernel = library.load("attention_scalar", AttentionScalarParams(), WARPS * 32, defines=defines)

    def launch(
        self,
        layer: int,
        pool: torch.Tensor,
        q: torch.Tensor,
        block_tables: torch.Tensor,
        sequences: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend from each token to itself and all tokens before it in its sequence.

        Args:
            layer: Decoder layer.
            pool: uint8 ``[pages, page_bytes]``.
            q: ``[tokens, >= heads * head_dim]``; the heads first in each row.
            block_tables: int32 ``[rows, width]``; page ids.
            sequences: int32 ``[tokens]``; row of the block tables; -1 for padding.
            positions: int32 ``[tokens]``.
            out: ``[tokens, heads * head_dim]``.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, dtype, params, tokens = self._library.check, self._library.dtype, self._kernel.params, out.shape[0]
        self._layout.fill(params.kv, self._library, layer, pool, block_tables, self._scale)
        params.q = check("q", q, dtype, -1, -1)
        params.q_stride = q.shape[1]
        params.out = check("out", out, dtype, -1, self._layout.num_heads * self._layout.head_dim)
        params.sequences = check("sequences", sequences, torch.int32, tokens)
        params.positions = check("positions", positions, torch.int32, tokens)
        self._kernel.launch(-(-self._layout.num_heads // WARPS), tokens)
