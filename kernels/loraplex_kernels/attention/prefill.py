"""Paged causal attention of prefill chunks, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from loraplex_kernels.params import AttentionPrefillParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary

BLOCK: Final = 128
TILE_ROWS: Final = 128  # kRows: packed (token, query head of the group) rows
TILE_INTS: Final = 8


def make_tiles(
    sequences: NDArray[np.int32], starts: NDArray[np.int32], counts: NDArray[np.int32], first_token: int, group: int
) -> NDArray[np.int32]:
    """Cut chunks into tiles, those that see most keys first, so that none of them is left for the end.

    Args:
        sequences: int32 ``[N]``; row of the block tables of each chunk.
        starts: int32 ``[N]``; tokens of the sequence before the chunk.
        counts: int32 ``[N]``; tokens of the chunk; chunks lie one after another in q and out.
        first_token: Row of the first chunk's first token in q and out.
        group: Query heads per KV head.

    Returns:
        int32 ``[tiles, 8]``.
    """
    per_chunk = -(-counts.astype(np.int64) * group // TILE_ROWS)
    chunk = np.repeat(np.arange(len(counts)), per_chunk)
    within = np.arange(len(chunk)) - np.repeat(np.cumsum(per_chunk) - per_chunk, per_chunk)
    tiles = np.zeros((len(chunk), TILE_INTS), dtype=np.int32)
    tiles[:, 0], tiles[:, 2], tiles[:, 3] = sequences[chunk], starts[chunk], counts[chunk]
    tiles[:, 1] = (first_token + np.cumsum(counts) - counts)[chunk]
    tiles[:, 4] = within * TILE_ROWS
    keys = tiles[:, 2] + tiles[:, 4] // group
    return tiles[np.argsort(-keys, kind="stable")]


class AttentionPrefill:
    """``out = softmax(scale * q K^T) V`` of chunks; their K and V are in the pool already."""

    def __init__(self, library: KernelLibrary, layout: KvLayout) -> None:
        self._library, self._layout = library, layout
        shared = (TILE_ROWS + 4 * 64) * layout.head_dim * 2
        defines = (f"HEAD_DIM={layout.head_dim}", f"SHARED_BYTES={shared}")
        self._kernel = library.load(
            "attention_prefill", AttentionPrefillParams(), BLOCK, defines=defines, shared_bytes=shared
        )

    def launch(
        self,
        layer: int,
        pool: torch.Tensor,
        q: torch.Tensor,
        block_tables: torch.Tensor,
        tiles: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend from every token of the chunks.

        Args:
            layer: Decoder layer.
            pool: uint8 ``[pages, page_bytes]``.
            q: ``[tokens, >= heads * head_dim]``; the heads first in each row.
            block_tables: int32 ``[rows, width]``; page ids.
            tiles: int32 ``[tiles, 8]``; from `make_tiles`.
            out: ``[tokens, heads * head_dim]``; rows of no chunk are not written.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, dtype, params = self._library.check, self._library.dtype, self._kernel.params
        self._layout.fill(params.kv, self._library, layer, pool, block_tables)
        params.q = check("q", q, dtype, -1, -1)
        params.q_stride = q.shape[1]
        params.out = check("out", out, dtype, -1, self._layout.num_heads * self._layout.head_dim)
        params.tiles = check("tiles", tiles, torch.int32, -1, TILE_INTS)
        self._kernel.launch(self._layout.num_kv_heads, tiles.shape[0])
