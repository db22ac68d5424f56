"""How keys and values lie in the pool's pages, in torch: in the type that is computed in, or as e4m3 with scales.

A *row* is one head's keys (or values) of one block in one layer; row r of page p has the index p * R + r, with R =
`PoolGeometry.rows_per_page`, and its token t the index (p * R + r) * block_tokens + t.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.pool_geometry import PoolGeometry

MAX_E4M3: Final = 448.0
MAX_SCALE: Final = 127.5  # the kernels' largest: 2^120 times it is still a bf16
MIN_SCALE: Final = 2.0**-100  # its inverse is a float


def quantise(keys_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys or values as e4m3 ``[..., head_dim]``, and one bf16 scale for each of their rows ``[...]``.

    A scale is the largest magnitude over 448, so that no value is clipped below 448 * 127.5. One that is not finite makes
    the scale, hence the whole row, not a number: a broken row is handed on, not hidden. The kernels compute the same bits.

    Args:
        keys_values: ``[..., head_dim]``.
    """
    wide = keys_values.float()
    most = wide.abs().amax(-1)
    scales = (most * (1 / MAX_E4M3)).clamp(MIN_SCALE, MAX_SCALE).to(torch.bfloat16)
    scales = torch.where(most.isfinite(), scales, math.nan)
    values = (wide * scales.float().reciprocal()[..., None]).clamp(-MAX_E4M3, MAX_E4M3)
    return values.to(torch.float8_e4m3fn), scales


class PlainKv:
    """Keys and values in the type that is computed in.

    Args:
        pages: uint8 ``[num_pages, page_bytes]``.
        geometry: Their shape.
        dtype: Type of keys and values.
    """

    def __init__(self, pages: Tensor, geometry: PoolGeometry, dtype: torch.dtype) -> None:
        values = pages.view(dtype).view(-1)
        self._rows = values.view(-1, geometry.block_tokens * geometry.head_dim)
        self._tokens = values.view(-1, geometry.head_dim)

    def write(self, index: Tensor, keys_values: Tensor) -> None:
        """Write ``[n, head_dim]`` to the tokens ``index``, int64 ``[n]``; they are kept as they are."""
        self._tokens.index_copy_(0, index, keys_values)

    def gather(self, index: Tensor, out: Tensor) -> None:
        """Read the rows ``index``, int64 ``[n]``, into ``[n, block_tokens * head_dim]``."""
        torch.index_select(self._rows, 0, index, out=out)


class Fp8Kv:
    """Keys and values as e4m3, with a scale for each token and head behind them in the page (`PoolGeometry`).

    Args:
        pages: uint8 ``[num_pages, page_bytes]``.
        geometry: Their shape.
    """

    def __init__(self, pages: Tensor, geometry: PoolGeometry) -> None:
        size, heads = geometry.block_tokens, geometry.num_kv_heads
        self._rows_per_page, self._heads, self._block_tokens = geometry.rows_per_page, heads, size
        stored = pages[:, : geometry.values_bytes]
        self._values = torch.unflatten(stored, 1, (geometry.rows_per_page, size, geometry.head_dim))
        begin, count = geometry.values_bytes // 2, geometry.scales_bytes // 2
        scales = pages.view(torch.bfloat16)[:, begin : begin + count]
        self._scales = torch.unflatten(scales, 1, (geometry.num_layers, heads, size, 2))

    def write(self, index: Tensor, keys_values: Tensor) -> Tensor:
        """Write ``[n, head_dim]`` to the tokens ``index``, int64 ``[n]``, and return what was kept of them, in fp32."""
        values, scales = quantise(keys_values)
        token, (page, row) = index % self._block_tokens, self._place(index // self._block_tokens)
        self._values[page, row, token] = values.view(torch.uint8)
        self._scales[page, row // (2 * self._heads), row % self._heads, token, row // self._heads % 2] = scales
        return values.float() * scales.float()[:, None]

    def gather(self, index: Tensor, out: Tensor) -> None:
        """Read the rows ``index``, int64 ``[n]``, into ``[n, block_tokens * head_dim]``."""
        page, row = self._place(index)
        values = self._values[page, row].view(torch.float8_e4m3fn).float()
        layer, half, head = row // (2 * self._heads), row // self._heads % 2, row % self._heads
        scales = self._scales[page[:, None], layer[:, None], head[:, None], self._tokens(page), half[:, None]]
        out.view(values.shape).copy_(values * scales.float()[..., None])

    def _place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return page and row of the rows ``index``."""
        return index // self._rows_per_page, index % self._rows_per_page

    def _tokens(self, like: Tensor) -> Tensor:
        return torch.arange(self._block_tokens, device=like.device)


def make_kv_store(pages: Tensor, geometry: PoolGeometry, dtype: torch.dtype) -> PlainKv | Fp8Kv:
    """Return what reads and writes the keys and values of pages ``[num_pages, page_bytes]``."""
    return Fp8Kv(pages, geometry) if geometry.is_fp8 else PlainKv(pages, geometry, dtype)
