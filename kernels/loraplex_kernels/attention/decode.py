"""Paged attention of one new token per sequence, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from loraplex_kernels.attention.paged_kv import softcap_defines
from loraplex_kernels.params import AttentionDecodeParams

if TYPE_CHECKING:
    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary

BLOCK: Final = 128
HEADS_PER_CTA: Final = 8
MIN_SPLIT_TOKENS: Final = 128


def ctas_per_sm(head_dim: int) -> int:
    """Return the CTAs that a multiprocessor holds: ``kCtas`` of decode.cu."""
    return 2 if head_dim > 128 else 4


def num_splits(units: int, num_ctas: int, max_context: int) -> int:
    """Return how many CTAs share a (sequence, KV head): one wave of CTAs, none with fewer than `MIN_SPLIT_TOKENS`.

    Args:
        units: (Sequence, KV head) pairs, or more where a KV head's query heads need several CTAs.
        num_ctas: CTAs that the device holds at a time.
        max_context: Longest context, in tokens.

    Measured on an H100: at 512 units 1 split beats 2 by 14 % (512 tokens); at 64 units 4..8 beat 16 by 15 %.
    """
    return max(1, min(num_ctas // max(units, 1), -(-max_context // MIN_SPLIT_TOKENS), 64))


class AttentionDecode:
    """``out = softmax(scale * q K^T) V`` over paged K and V; heads of 64, 80, 96, 128 or 256.

    Args:
        library: Compiles and loads the kernel; bf16.
        layout: Place of K and V in pages.
        max_rows: Most sequences of a launch.
        max_context: Longest context, which bounds the splits.
        scale: Factor on ``q k``; None for 1 / sqrt(head_dim).
        softcap: Scores are ``softcap * tanh(scale * q k / softcap)``; None for plain ones.
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
        self._library, self._layout, self._max_context, self._scale = library, layout, max_context, scale
        group_blocks = -(-layout.num_heads // layout.num_kv_heads // HEADS_PER_CTA)
        self._units = layout.num_kv_heads * group_blocks
        self._num_ctas = library.num_multiprocessors * ctas_per_sm(layout.head_dim)
        self._capacity = most = max(rows * self._units * self.splits(rows) for rows in range(1, max_rows + 1))
        device, head_dim = library.device, layout.head_dim
        self._partial_out = torch.empty(most * HEADS_PER_CTA * head_dim, dtype=torch.float32, device=device)
        self._partial_stats = torch.empty(most * HEADS_PER_CTA * 2, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(max_rows * self._units, dtype=torch.int32, device=device)
        defines = (f"HEAD_DIM={head_dim}", *layout.kv_defines, *softcap_defines(softcap))
        self._kernel = library.load("attention_decode", AttentionDecodeParams(), BLOCK, defines=defines)

    def splits(self, rows: int) -> int:
        """Return the splits of a launch over ``rows`` sequences; a fixed number for each graph bucket."""
        return num_splits(rows * self._units, self._num_ctas, self._max_context)

    def launch(
        self,
        layer: int,
        pool: torch.Tensor,
        q: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        out: torch.Tensor,
        *,
        splits: int | None = None,
    ) -> None:
        """Attend from one token per sequence.

        Args:
            layer: Decoder layer.
            pool: uint8 ``[pages, page_bytes]``.
            q: ``[rows, >= heads * head_dim]``; the heads first in each row, e.g. the fused q, k, v rows.
            block_tables: int32 ``[rows, width]``; page ids.
            context_lens: int32 ``[rows]``; tokens seen, the new one included; 0 for padding.
            out: ``[rows, heads * head_dim]``.
            splits: Most CTAs per (sequence, KV head); the result of `splits` if unset.

        Raises:
            ValueError: If a shape, dtype or device differs, or the partial sums have no room for the splits.
        """
        check, dtype, params, rows = self._library.check, self._library.dtype, self._kernel.params, out.shape[0]
        splits = splits or self.splits(rows)
        if splits > 1 and rows * self._units * splits > self._capacity:
            raise ValueError(f"{rows} rows x {self._units} x {splits} splits exceed {self._capacity} partial sums")
        self._layout.fill(params.kv, self._library, layer, pool, block_tables, self._scale)
        params.q = check("q", q, dtype, -1, -1)
        params.q_stride = q.shape[1]
        params.out = check("out", out, dtype, -1, self._layout.num_heads * self._layout.head_dim)
        params.context_lens = check("context_lens", context_lens, torch.int32, rows)
        params.partial_out, params.partial_stats = self._partial_out.data_ptr(), self._partial_stats.data_ptr()
        params.arrivals, params.min_split = self._arrivals.data_ptr(), MIN_SPLIT_TOKENS
        self._kernel.launch(splits, self._units, rows)
