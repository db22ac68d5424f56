"""The place of K and V in the pool, as the kernels see it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.params import PagedKv


def softcap_defines(softcap: float | None) -> tuple[str, ...]:
    """Return the macros of an attention kernel whose scores are ``softcap * tanh(scale * q k / softcap)``.

    Args:
        softcap: Bound on the scores; None for plain ``scale * q k``.

    Raises:
        ValueError: If the bound is not above 0.
    """
    if softcap is None:
        return ()
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap {softcap} is not a number above 0")
    return (f"SOFTCAP={float(softcap)!r}f",)


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Shape of the K and V of all layers inside a page: ``[layer][K|V][kv_head][token][dim]``.

    K and V are in the kernels' element type, or e4m3 with one bf16 scale for each token and head (csrc/attention/kv_fp8.cuh).

    Attributes:
        block_tokens: Tokens of a page, a power of two.
        window: Sliding window in tokens; 0 for none.
        scales_offset: Bytes from a page's start to the scales of e4m3, ``[layer][kv_head][token][K|V]``; None: K and V are
            in the kernels' element type.
    """

    page_bytes: int
    block_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    scales_offset: int | None = None

    def __post_init__(self) -> None:
        if self.block_tokens <= 0 or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"block_tokens {self.block_tokens} is not a power of two")
        if self.scales_offset is not None and self.scales_offset % 4:
            raise ValueError(f"scales that begin at byte {self.scales_offset} of a page are on no 4 bytes")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads are no multiple of {self.num_kv_heads} KV heads")

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def layer_offset(self, layer: int, item_bytes: int) -> int:
        """Return the bytes from a page's start to a layer's K; an element of K has ``item_bytes`` unless it is e4m3."""
        size = item_bytes if self.scales_offset is None else 1
        return layer * 2 * self.num_kv_heads * self.block_tokens * self.head_dim * size

    @property
    def kv_defines(self) -> tuple[str, ...]:
        """Macros of a kernel that reads or writes K and V, besides their size."""
        return () if self.scales_offset is None else (f"KV_SCALES={self.scales_offset}",)

    def fill(
        self,
        params: PagedKv,
        library: KernelLibrary,
        layer: int,
        pool: torch.Tensor,
        block_tables: torch.Tensor,
        scale: float | None,
    ) -> None:
        """Set the parameters of an attention kernel.

        Args:
            params: Struct to fill.
            library: Library of the kernel.
            layer: Decoder layer.
            pool: uint8 ``[pages, page_bytes]``.
            block_tables: int32 ``[sequences, width]``; page ids.
            scale: Factor on ``q k``; None for 1 / sqrt(head_dim).

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        params.pool = library.check("pool", pool, torch.uint8, -1, self.page_bytes)
        params.block_tables = library.check("block_tables", block_tables, torch.int32, -1, -1)
        params.page_bytes = self.page_bytes
        params.layer_offset = self.layer_offset(layer, library.dtype.itemsize)
        params.table_stride = block_tables.shape[1]
        params.block_shift = self.block_tokens.bit_length() - 1
        params.num_heads, params.num_kv_heads = self.num_heads, self.num_kv_heads
        params.window = self.window
        params.scale = self.head_dim**-0.5 if scale is None else scale
