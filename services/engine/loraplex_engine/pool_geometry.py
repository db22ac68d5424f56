"""The size of a page of the unified pool, and the place of a token's keys and values in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import ITEM_BYTES, TILE_ALIGN

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo

TARGET_PAGE_BYTES: Final = 2 * 1024 * 1024
GPU_POOL_SHARE: Final = 0.85
"""Share of the memory that the weights leave; the rest is for activations, graphs and the allocator."""
BLOCK_TOKENS: Final = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolGeometry:
    """Shape of a KV page, in-page order ``[layer][K|V][kv_head][token][dim]``; adapter pages have the same size.

    Bytes of a page, with R = `row_bytes`, H = ``num_kv_heads``, i = (layer * 2 + (0 for K, 1 for V)) * H + kv_head, and
    d = the bytes of one head's key of one token, R / ``block_tokens``:

        [i * R, (i + 1) * R)                    one head's keys or values of the block in one layer
        [i * R + t * d, i * R + (t + 1) * d)    the part of token t of the block

    Attributes:
        dtype: ``float32`` or ``bfloat16``: type of keys, values and adapter weights.
        num_kv_heads: Heads held by one tensor-parallel rank.
        block_tokens: Tokens per page.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one head's keys (or values) of one block in one layer: the smallest contiguous piece."""
        return self.block_tokens * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def rows_per_page(self) -> int:
        """Pieces of `row_bytes` in a page."""
        return self.num_layers * 2 * self.num_kv_heads

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.rows_per_page * self.row_bytes

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many pages a sequence of ``num_tokens`` takes."""
        return -(-num_tokens // self.block_tokens)


def choose_pool_geometry(info: BaseModelInfo, *, dtype: str, tp_degree: int = 1) -> PoolGeometry:
    """Pick ``block_tokens``: the smallest power of two up to 16 whose page reaches 2 MiB, else 16.

    Raises:
        ValueError: If the model's heads cannot be split evenly or its pages cannot be aligned.
    """
    if info.num_kv_heads % tp_degree:
        raise ValueError(f"{info.num_kv_heads} KV heads cannot be split over {tp_degree} ranks")
    sizes = [
        PoolGeometry(
            dtype=dtype,
            num_layers=info.num_layers,
            num_kv_heads=info.num_kv_heads // tp_degree,
            head_dim=info.head_dim,
            block_tokens=block_tokens,
        )
        for block_tokens in BLOCK_TOKENS
    ]
    chosen = next((geometry for geometry in sizes if geometry.page_bytes >= TARGET_PAGE_BYTES), sizes[-1])
    if chosen.page_bytes % TILE_ALIGN:
        raise ValueError(f"pages of {chosen.page_bytes} bytes are no multiple of {TILE_ALIGN}: {info.head_dim=} is odd")
    return chosen
