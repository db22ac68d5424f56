"""Qk-norm, rotary embedding and the write of K and V into pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_kernels.params import RopeParams

if TYPE_CHECKING:
    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary

BLOCK = 256
DIMS_PER_THREAD = 16


class RopeKv:
    """Finishes the fused q, k, v rows of a layer.

    Args:
        library: Compiles and loads the kernel.
        layout: Place of K and V in pages.
        pool: uint8 ``[pages, page_bytes]``.
        rotary: fp32 ``[positions, head_dim]``; cosines of the half frequencies, then their sines.
        norm_eps: Epsilon of qk-norm.
    """

    def __init__(
        self,
        library: KernelLibrary,
        layout: KvLayout,
        pool: torch.Tensor,
        rotary: torch.Tensor,
        *,
        norm_eps: float = 1e-6,
    ) -> None:
        self._library, self._layout, self._eps = library, layout, norm_eps
        self._pool = library.check("pool", pool, torch.uint8, -1, layout.page_bytes)
        self._rotary = library.check("rotary", rotary, torch.float32, -1, layout.head_dim)
        self._kept = (pool, rotary)
        self._kernel = library.load("rope_kv", RopeParams(), BLOCK, defines=(f"HEAD_DIM={layout.head_dim}",))

    def launch(
        self,
        layer: int,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        delta: torch.Tensor | None = None,
    ) -> None:
        """Normalise and rotate q and k; q stays in place, K and V go to their pages.

        Args:
            layer: Decoder layer.
            qkv: ``[tokens, (heads + 2 * kv_heads) * head_dim]``.
            positions: int32 ``[tokens]``.
            kv_slots: int32 ``[tokens]``; page * block_tokens + token in page; -1 stores nothing (padding).
            q_norm: ``[head_dim]``, if the model has qk-norm.
            k_norm: The same for k.
            delta: fp32, same shape as ``qkv``; added to ``qkv`` first.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, dtype, layout, params = self._library.check, self._library.dtype, self._layout, self._kernel.params
        tokens = qkv.shape[0]
        params.qkv = check("qkv", qkv, dtype, -1, layout.qkv_width)
        params.rotary, params.pool = self._rotary, self._pool
        params.positions = check("positions", positions, torch.int32, tokens)
        params.kv_slots = check("kv_slots", kv_slots, torch.int32, tokens)
        params.q_norm = None if q_norm is None else check("q_norm", q_norm, dtype, layout.head_dim)
        params.k_norm = None if k_norm is None else check("k_norm", k_norm, dtype, layout.head_dim)
        params.delta = None if delta is None else check("delta", delta, torch.float32, tokens, layout.qkv_width)
        params.page_bytes = layout.page_bytes
        params.layer_offset = layout.layer_offset(layer, dtype.itemsize)
        params.num_heads, params.num_kv_heads = layout.num_heads, layout.num_kv_heads
        params.block_tokens, params.norm_eps = layout.block_tokens, self._eps
        heads = layout.num_heads + 2 * layout.num_kv_heads
        heads_per_block = BLOCK * DIMS_PER_THREAD // layout.head_dim
        self._kernel.launch(-(-heads // heads_per_block), tokens)
