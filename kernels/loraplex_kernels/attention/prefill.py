"""Paged causal attention of prefill chunks, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from loraplex_kernels.attention.paged_kv import softcap_defines
from loraplex_kernels.params import AttentionPrefillParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary

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


def block_threads(head_dim: int) -> int:
    """Return the threads of a CTA: ``kThreads`` of prefill.cu."""
    return 256 if head_dim > 128 else 128


def shared_bytes(head_dim: int, available: int, *, is_fp8: bool = False) -> int:
    """Return the shared memory of a CTA: the tile's rows of q, and two tiles each of K and V, of FP8 one more in bf16.

    Args:
        head_dim: 64, 80, 96, 128 or 256.
        available: Most bytes that a CTA may have on the device.
        is_fp8: Whether K and V are e4m3.

    Raises:
        ValueError: If the smallest tiles take more.
    """
    row = 2 * head_dim + (0 if head_dim % 64 == 0 else 16)
    token = 2 * row + 4 * head_dim + 8 if is_fp8 else 4 * row
    choices = (32, 16) if head_dim > 128 else (64,)
    sizes = [TILE_ROWS * row + tokens * token for tokens in choices]
    fitting = [size for size in sizes if size <= available]
    if not fitting:
        raise ValueError(
            f"heads of {head_dim} dimensions take {sizes[-1]} bytes of shared memory, this device has {available}"
        )
    return fitting[0]


class AttentionPrefill:
    """``out = softmax(scale * q K^T) V`` of chunks; their K and V are in the pool already.

    Args:
        library: Compiles and loads the kernel; bf16.
        layout: Place of K and V in pages; heads of 64, 80, 96, 128 or 256.
        scale: Factor on ``q k``; None for 1 / sqrt(head_dim).
        softcap: Scores are ``softcap * tanh(scale * q k / softcap)``; None for plain ones.

    Raises:
        ValueError: If the device has too little shared memory.
    """

    def __init__(
        self, library: KernelLibrary, layout: KvLayout, *, scale: float | None = None, softcap: float | None = None
    ) -> None:
        self._library, self._layout, self._scale = library, layout, scale
        is_fp8 = layout.scales_offset is not None
        shared = shared_bytes(layout.head_dim, library.max_shared_bytes, is_fp8=is_fp8)
        self._kernel = library.load(
            "attention_prefill",
            AttentionPrefillParams(),
            block_threads(layout.head_dim),
            defines=(
                f"HEAD_DIM={layout.head_dim}",
                *layout.kv_defines,
                f"SHARED_BYTES={shared}",
                *softcap_defines(softcap),
            ),
            shared_bytes=shared,
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
        self._layout.fill(params.kv, self._library, layer, pool, block_tables, self._scale)
        params.q = check("q", q, dtype, -1, -1)
        params.q_stride = q.shape[1]
        params.out = check("out", out, dtype, -1, self._layout.num_heads * self._layout.head_dim)
        params.tiles = check("tiles", tiles, torch.int32, -1, TILE_INTS)
        self._kernel.launch(self._layout.num_kv_heads, tiles.shape[0])
