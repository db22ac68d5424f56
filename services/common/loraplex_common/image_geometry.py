"""What an adapter's page image depends on: the engine's geometry, and which projections the adapter adapts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYOUT_VERSION: Final = 1
TILE_BYTES: Final = 32 * 1024
TILE_ALIGN: Final = 128

OPS: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
OP_SLICES: Final = tuple(OPS.values())
OP_INDEX: Final = {op: index for index, op in enumerate(OPS)}
PROJECTIONS: Final = tuple(projection for slices in OPS.values() for projection in slices)
ROW_PARALLEL: Final = frozenset({"o_proj", "down_proj"})  # split along their inputs under tensor parallelism
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2}


Ranks: TypeAlias = tuple[tuple[int, str, int], ...]
"""``(layer, projection, rank)`` of every module: what the layout depends on, and a key to cache it by."""


class ImageError(ValueError):
    """An adapter cannot be laid out in this geometry; the message says what does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """All that an image depends on besides the adapter.

    Attributes:
        dtype: ``float32`` (CPU) or ``bfloat16`` (GPU): the engine's compute dtype.
        page_bytes: Bytes of a page of the pool.
        tp_degree: Tensor-parallel degree; there is one image per rank.
    """

    layout_version: int = LAYOUT_VERSION
    dtype: str
    page_bytes: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tp_degree: int = 1

    def __post_init__(self) -> None:
        if self.layout_version != LAYOUT_VERSION:
            raise ImageError(f"layout version {self.layout_version} is not {LAYOUT_VERSION}: upgrade the older side")
        if self.dtype not in ITEM_BYTES:
            raise ImageError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if self.page_bytes <= 0 or self.page_bytes % TILE_ALIGN:
            raise ImageError(f"page_bytes {self.page_bytes} is not a positive multiple of {TILE_ALIGN}")
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if self.tp_degree <= 0 or getattr(self, name) % self.tp_degree:
                raise ImageError(f"{name} {getattr(self, name)} cannot be split over tp_degree {self.tp_degree}")

    @property
    def tile_bytes(self) -> int:
        """Largest tile, in bytes."""
        return min(TILE_BYTES, self.page_bytes)

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """Return a projection's unsharded ``(in_features, out_features)``."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, query),
            "k_proj": (self.hidden_size, key_value),
            "v_proj": (self.hidden_size, key_value),
            "o_proj": (query, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }[projection]

    def local_shape(self, projection: str) -> tuple[int, int]:
        """Return the ``(in_features, out_features)`` that one tensor-parallel rank computes."""
        rows_in, rows_out = self.projection_shape(projection)
        if projection in ROW_PARALLEL:
            return rows_in // self.tp_degree, rows_out
        return rows_in, rows_out // self.tp_degree


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted projection of one layer.

    Attributes:
        scaling: Factor on B·A·x: alpha / rank, or alpha / sqrt(rank) for rsLoRA; fp32 in the device table.
    """

    layer: int
    projection: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an engine must know of an adapter besides its pages.

    Attributes:
        digest: The revision: sha256 over canonical config and tensors, 64 hex digits.
        modules: Adapted projections, sorted by (layer, order of ``PROJECTIONS``).
    """

    digest: str
    modules: tuple[ModuleSpec, ...]

    @property
    def max_rank(self) -> int:
        """Largest rank of any module."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def ranks(self) -> Ranks:
        """``(layer, projection, rank)`` of every module."""
        return tuple((module.layer, module.projection, module.rank) for module in self.modules)

    def to_json(self) -> bytes:
        """Encode for the wire."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> AdapterSpec:
        """Decode what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(data)
        return cls(fields["digest"], tuple(ModuleSpec(**module) for module in fields["modules"]))
