"""Qk-norm, rotary embedding and the write of K and V into pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from loraplex_kernels.params import RopeParams

if TYPE_CHECKING:
    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary

BLOCK: Final = 256
LANE_DIMS: Final = 16
"""Dims that a thread takes of a head; of those that are rotated, a thread takes as many, or none."""


def heads_of_block(head_dim: int) -> int:
    """Return how many heads a block takes: the threads of each are a power of two."""
    return BLOCK >> (head_dim // LANE_DIMS - 1).bit_length()


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeStyle:
    """How q and k are normalised and rotated; the defaults are Llama's.

    Attributes:
        rotary_dim: How many of a head's first dims are rotated, a multiple of 16; 0 for none, None for all.
        interleaved: Whether dims 2i and 2i + 1 are a pair, not i and i + rotary_dim / 2.
        unit_offset: Whether norms multiply by 1 + weight, rounding once, behind the product.
        norms_whole: Whether q and k are normalised over all their heads at once, not each head by itself.
    """

    rotary_dim: int | None = None
    interleaved: bool = False
    unit_offset: bool = False
    norms_whole: bool = False

    def __post_init__(self) -> None:
        if (self.rotary_dim or 0) % LANE_DIMS:
            raise ValueError(f"rotary_dim {self.rotary_dim} is no multiple of {LANE_DIMS}")

    def defines(self, head_dim: int) -> tuple[str, ...]:
        """Return the macros of the kernel."""
        flags = {"INTERLEAVED": self.interleaved, "NORM_OFFSET": self.unit_offset, "WHOLE_NORM": self.norms_whole}
        rotates_all = self.rotary_dim in (None, head_dim)
        rotary = () if rotates_all else (f"ROTARY_DIM={self.rotary_dim}",)
        return (f"HEAD_DIM={head_dim}", *rotary, *(name for name, is_set in flags.items() if is_set))


LLAMA_STYLE: Final = RopeStyle()


class RopeKv:
    """Finishes the fused q, k, v rows of a layer.

    Args:
        library: Compiles and loads the kernel.
        layout: Place of K and V in pages.
        pool: uint8 ``[pages, page_bytes]``.
        rotary: fp32 ``[positions, rotary_dim]``; cosines of the half frequencies, then their sines. None if nothing is rotated.
        norm_eps: Epsilon of q's and k's norms.
        style: How q and k are normalised and rotated.
        query_scale: fp32 ``[positions]``; factor of the queries behind their rotation, rounded to the element type; None if it is 1.

    Raises:
        ValueError: If a shape, dtype or device differs, or the table does not fit the style.
    """

    def __init__(
        self,
        library: KernelLibrary,
        layout: KvLayout,
        pool: torch.Tensor,
        rotary: torch.Tensor | None,
        *,
        norm_eps: float = 1e-6,
        style: RopeStyle = LLAMA_STYLE,
        query_scale: torch.Tensor | None = None,
    ) -> None:
        self._library, self._layout, self._style = library, layout, style
        width = layout.head_dim if style.rotary_dim is None else style.rotary_dim
        if (rotary is None) != (width == 0):
            raise ValueError(f"a table of cosines and sines is needed if, and only if, dims are rotated: {width} are")
        params = RopeParams(norm_eps=norm_eps, page_bytes=layout.page_bytes, block_tokens=layout.block_tokens)
        params.num_heads, params.num_kv_heads = layout.num_heads, layout.num_kv_heads
        params.pool = library.check("pool", pool, torch.uint8, -1, layout.page_bytes)
        if rotary is not None:
            params.rotary = library.check("rotary", rotary, torch.float32, -1, width)
        defines = (*style.defines(layout.head_dim), *layout.kv_defines)
        if query_scale is not None:
            params.query_scale = library.check("query_scale", query_scale, torch.float32, -1)
            defines = (*defines, "QUERY_SCALE")
        self._kept = (pool, rotary, query_scale)
        self._kernel = library.load("rope_kv", params, BLOCK, defines=defines)
        heads = layout.num_heads + 2 * layout.num_kv_heads
        self._blocks = len("qkv") if style.norms_whole else -(-heads // heads_of_block(layout.head_dim))

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
            q_norm: ``[head_dim]``, or ``[heads * head_dim]`` of a norm over all heads; if the model has one.
            k_norm: The same for k.
            delta: fp32, same shape as ``qkv``; added to ``qkv`` first.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, dtype, layout, params = self._library.check, self._library.dtype, self._layout, self._kernel.params
        tokens, is_whole = qkv.shape[0], self._style.norms_whole
        if is_whole and (q_norm is None or k_norm is None):
            raise ValueError("norms over all heads need weights")
        q_width = layout.head_dim * (layout.num_heads if is_whole else 1)
        k_width = layout.head_dim * (layout.num_kv_heads if is_whole else 1)
        params.qkv = check("qkv", qkv, dtype, -1, layout.qkv_width)
        params.positions = check("positions", positions, torch.int32, tokens)
        params.kv_slots = check("kv_slots", kv_slots, torch.int32, tokens)
        params.q_norm = None if q_norm is None else check("q_norm", q_norm, dtype, q_width)
        params.k_norm = None if k_norm is None else check("k_norm", k_norm, dtype, k_width)
        params.delta = None if delta is None else check("delta", delta, torch.float32, tokens, layout.qkv_width)
        params.layer_offset = layout.layer_offset(layer, dtype.itemsize)
        self._kernel.launch(self._blocks, tokens)
