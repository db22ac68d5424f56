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
SCALE_BYTES: Final = 2
"""Bytes of the bf16 scale of one token's key, or value, of one head."""
KV_DTYPES: Final = ("", "fp8")
BLOCK_TOKENS: Final = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolGeometry:
    """Shape of a KV page, in-page order ``[layer][K|V][kv_head][token][dim]``; adapter pages have the same size.

    Keys and values are of ``dtype``, or e4m3 with one bf16 scale for each token and head. Bytes of a page, with R = `row_bytes`, H = ``num_kv_heads``, i = (layer * 2 + (0 for K, 1 for V)) * H + kv_head, and
    d = the bytes of one head's key of one token, R / ``block_tokens``:

        [i * R, (i + 1) * R)                    one head's keys or values of the block in one layer
        [i * R + t * d, i * R + (t + 1) * d)    the part of token t of the block

    and of e4m3, with V = `values_bytes` = ``num_layers`` * 2 * H * R, B = ``block_tokens``, j = layer * H + kv_head:

        [V + 4 * (j * B + t), V + 4 * (j * B + t) + 4)          scales of token t, bf16: of its key, then of its value
        [V + `scales_bytes`, `page_bytes`)                      nothing: pages are whole multiples of `TILE_ALIGN`

    Attributes:
        dtype: ``float32`` or ``bfloat16``: type of adapter weights, and of keys and values unless ``kv_dtype`` says another.
        num_kv_heads: Heads held by one tensor-parallel rank.
        block_tokens: Tokens per page.
        kv_dtype: ``fp8``: keys and values are e4m3 with scales; empty: they are of ``dtype``.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    kv_dtype: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"keys and values of {self.kv_dtype!r} are none of {KV_DTYPES}")

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are e4m3 with scales."""
        return self.kv_dtype == "fp8"

    @property
    def row_bytes(self) -> int:
        """Bytes of one head's keys (or values) of one block in one layer: the smallest contiguous piece."""
        return self.block_tokens * self.head_dim * (1 if self.is_fp8 else ITEM_BYTES[self.dtype])

    @property
    def rows_per_page(self) -> int:
        """Pieces of `row_bytes` in a page."""
        return self.num_layers * 2 * self.num_kv_heads

    @property
    def values_bytes(self) -> int:
        """Bytes of the keys and values of a page."""
        return self.rows_per_page * self.row_bytes

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales of a page."""
        return SCALE_BYTES * self.rows_per_page * self.block_tokens if self.is_fp8 else 0

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        if not self.is_fp8:
            return self.values_bytes
        return -(-(self.values_bytes + self.scales_bytes) // TILE_ALIGN) * TILE_ALIGN

    @property
    def token_bytes(self) -> int:
        """Bytes of keys, values and scales of one token."""
        return (self.values_bytes + self.scales_bytes) // self.block_tokens

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many pages a sequence of ``num_tokens`` takes."""
        return -(-num_tokens // self.block_tokens)


def choose_pool_geometry(info: BaseModelInfo, *, dtype: str, tp_degree: int = 1, kv_dtype: str = "") -> PoolGeometry:
    """Pick ``block_tokens``: the smallest power of two up to 16 whose page reaches 2 MiB, else 16.

    Ranks that are more than the heads of keys have one of them each, which others have, too.

    Raises:
        ValueError: If the model's heads cannot be split evenly or its pages cannot be aligned.
    """
    if info.num_kv_heads % tp_degree and tp_degree % info.num_kv_heads:
        raise ValueError(f"{info.num_kv_heads} KV heads cannot be split over {tp_degree} ranks")
    sizes = [
        PoolGeometry(
            dtype=dtype,
            num_layers=info.num_layers,
            num_kv_heads=max(info.num_kv_heads // tp_degree, 1),
            head_dim=info.head_dim,
            block_tokens=block_tokens,
            kv_dtype=kv_dtype,
        )
        for block_tokens in BLOCK_TOKENS
    ]
    chosen = next((geometry for geometry in sizes if geometry.page_bytes >= TARGET_PAGE_BYTES), sizes[-1])
    if chosen.page_bytes % TILE_ALIGN:
        raise ValueError(f"pages of {chosen.page_bytes} bytes are no multiple of {TILE_ALIGN}: {info.head_dim=} is odd")
    return chosen
