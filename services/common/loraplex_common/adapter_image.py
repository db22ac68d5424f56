"""The one definition of how an adapter lies in pages: packed by the store, read by the engine and its kernels.

An image is a stream of *tiles*. Per decoder layer, in the order qkv, o, gate_up, down, each fused projection ("op")
contributes first its A tiles, then its B tiles:

* **A tile** ``[R][k]``, row-major: columns ``[start, start + k)`` of the A matrices of all slices of the op, stacked
  (``R`` = sum of the slices' ranks), so that one pass over ``x`` serves q, k and v together.
* **B tile** ``[n][r]``, row-major: outputs ``[start, start + n)`` of one slice's B matrix with its own exact rank.

A tile is at most ``min(32 KiB, page)``, starts on a 128-byte boundary and never straddles a page, so that kernels use
16-byte vectors or one bulk copy and a tile's address is (page id, offset). ``k`` and ``n`` are multiples of 64 except
in the last tile of a matrix; neighbouring B tiles in a page are therefore contiguous. Waste: the end of each page and
the last page. Scaling is not folded in (design.md section 4). Nothing here needs torch: numpy only.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

LAYOUT_VERSION: Final = 1
TILE_BYTES: Final = 32 * 1024
TILE_ALIGN: Final = 128
TILE_STEP: Final = 64  # k and n are multiples of this, so that tiles stay aligned without padding

OPS: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
OP_INDEX: Final = {op: index for index, op in enumerate(OPS)}
PROJECTIONS: Final = tuple(projection for slices in OPS.values() for projection in slices)
ROW_PARALLEL: Final = frozenset({"o_proj", "down_proj"})  # split along their inputs under tensor parallelism
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2}

KIND_A: Final = 0
KIND_B: Final = 1
TILE_DTYPE: Final = np.dtype(
    [
        ("layer", np.int32),
        ("op", np.int32),  # index into OPS
        ("kind", np.int32),  # KIND_A or KIND_B
        ("slice", np.int32),  # index into OPS[op]; 0 for A, which stacks all slices
        ("start", np.int32),  # first column (A) or first output (B)
        ("rows", np.int32),
        ("cols", np.int32),
        ("page", np.int32),  # index into the image's pages
        ("offset", np.int32),  # bytes into that page, a multiple of TILE_ALIGN
    ]
)

Tensors = Mapping[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(layer, projection) -> (A ``[rank, in_features]``, B ``[out_features, rank]``), fp32, unsharded."""


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
    def ranks(self) -> tuple[tuple[int, str, int], ...]:
        """``(layer, projection, rank)`` of every module: what the layout depends on, and a key to cache it by."""
        return tuple((module.layer, module.projection, module.rank) for module in self.modules)

    def to_json(self) -> bytes:
        """Encode for the wire."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> AdapterSpec:
        """Decode what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(data)
        return cls(fields["digest"], tuple(ModuleSpec(**module) for module in fields["modules"]))


class ImageLayout(NamedTuple):
    """Where each tile of an image lies.

    Attributes:
        tiles: ``[num_tiles]`` of ``TILE_DTYPE``, in stream order.
        num_pages: Pages the image takes.
        used_bytes: Bytes up to the end of the last tile, in-page gaps included.
    """

    tiles: NDArray[np.void]
    num_pages: int
    used_bytes: int


class _Cursor:
    """Hands out aligned places for tiles, page after page."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.position = 0

    def place(self, num_bytes: int) -> tuple[int, int]:
        """Return (page, offset) of the next ``num_bytes`` that do not straddle a page."""
        start = -(-self.position // TILE_ALIGN) * TILE_ALIGN
        if start % self._page_bytes + num_bytes > self._page_bytes:
            start = -(-start // self._page_bytes) * self._page_bytes
        self.position = start + num_bytes
        return start // self._page_bytes, start % self._page_bytes


def _steps(length: int, unit_bytes: int, tile_bytes: int, what: str) -> list[tuple[int, int]]:
    """Cut ``length`` columns or outputs of ``unit_bytes`` each into half-open [start, stop) tiles."""
    step = tile_bytes // unit_bytes // TILE_STEP * TILE_STEP
    if step == 0:
        if length * unit_bytes > tile_bytes:
            raise ImageError(f"{what}: {TILE_STEP} x {unit_bytes} bytes exceed a tile of {tile_bytes} bytes")
        step = length
    return [(start, min(start + step, length)) for start in range(0, length, step)]


@functools.lru_cache(maxsize=1024)
def layout(geometry: Geometry, ranks: tuple[tuple[int, str, int], ...]) -> ImageLayout:
    """Lay an adapter of the given ``(layer, projection, rank)`` modules out in pages.

    Raises:
        ImageError: If a layer or projection does not exist, or a stacked rank is too large for a tile.
    """
    by_layer: dict[int, dict[str, int]] = {}
    for layer, projection, rank in ranks:
        if not 0 <= layer < geometry.num_layers:
            raise ImageError(f"layer {layer} does not exist: the base model has {geometry.num_layers}")
        if projection not in PROJECTIONS:
            raise ImageError(f"projection {projection!r} is not one of {', '.join(PROJECTIONS)}")
        if rank <= 0:
            raise ImageError(f"layer {layer} {projection}: rank {rank} is not positive")
        by_layer.setdefault(layer, {})[projection] = rank
    item = ITEM_BYTES[geometry.dtype]
    cursor = _Cursor(geometry.page_bytes)
    tiles: list[tuple[int, ...]] = []
    for layer in sorted(by_layer):
        for op, slices in OPS.items():
            present = [
                (index, name, by_layer[layer][name]) for index, name in enumerate(slices) if name in by_layer[layer]
            ]
            if not present:
                continue
            stacked = sum(rank for _, _, rank in present)
            columns = geometry.local_shape(slices[0])[0]
            where = f"layer {layer} {op}: stacked rank {stacked}"
            for start, stop in _steps(columns, stacked * item, geometry.tile_bytes, where):
                place = cursor.place((stop - start) * stacked * item)
                tiles.append((layer, OP_INDEX[op], KIND_A, 0, start, stacked, stop - start, *place))
            for index, name, rank in present:
                outputs = geometry.local_shape(name)[1]
                for start, stop in _steps(
                    outputs, rank * item, geometry.tile_bytes, f"layer {layer} {name}: rank {rank}"
                ):
                    place = cursor.place((stop - start) * rank * item)
                    tiles.append((layer, OP_INDEX[op], KIND_B, index, start, stop - start, rank, *place))
    table = np.array(tiles, dtype=TILE_DTYPE)
    table.setflags(write=False)
    return ImageLayout(table, -(-cursor.position // geometry.page_bytes), cursor.position)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round fp32 to the bits of bf16, to nearest even; NaN stays NaN. numpy has no bf16 of its own."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen the bits of bf16 to fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    return to_bfloat16(values) if dtype == "bfloat16" else np.ascontiguousarray(values, dtype=np.float32)


def _shard(
    geometry: Geometry, tp_rank: int, projection: str, axis_of: str, matrix: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Cut A's columns (row-parallel) or B's rows (column-parallel) to what one rank computes."""
    if (axis_of == "A") != (projection in ROW_PARALLEL):
        return matrix
    axis = 1 if axis_of == "A" else 0
    return np.split(matrix, geometry.tp_degree, axis=axis)[tp_rank]


def pack(geometry: Geometry, spec: AdapterSpec, tensors: Tensors, tp_rank: int = 0) -> NDArray[np.uint8]:
    """Build an adapter's image for one tensor-parallel rank.

    Returns:
        ``[num_pages, page_bytes]``, uint8; bytes that belong to no tile are zero.

    Raises:
        ImageError: If a tensor's shape differs from what spec and geometry say, or a value overflows the dtype.
    """
    plan = layout(geometry, spec.ranks)
    image = np.zeros((plan.num_pages, geometry.page_bytes), dtype=np.uint8)
    for layer, projection, rank in spec.ranks:
        columns, outputs = geometry.projection_shape(projection)
        a, b = tensors[layer, projection]
        for name, tensor, expected in (("lora_A", a, (rank, columns)), ("lora_B", b, (outputs, rank))):
            if tensor.shape != expected:
                raise ImageError(f"layer {layer} {projection} {name} has shape {tensor.shape}, expected {expected}")
    for tile in plan.tiles:
        op = tuple(OPS)[tile["op"]]
        start, stop = int(tile["start"]), int(tile["start"]) + int(tile["cols" if tile["kind"] == KIND_A else "rows"])
        if tile["kind"] == KIND_A:
            parts = [
                _shard(geometry, tp_rank, name, "A", tensors[int(tile["layer"]), name][0])[:, start:stop]
                for name in OPS[op]
                if (int(tile["layer"]), name) in tensors
            ]
            values = np.concatenate(parts)
        else:
            name = OPS[op][tile["slice"]]
            values = _shard(geometry, tp_rank, name, "B", tensors[int(tile["layer"]), name][1])[start:stop]
        data = _encode(values, geometry.dtype).reshape(-1).view(np.uint8)
        image[tile["page"], tile["offset"] : tile["offset"] + data.size] = data
    return image


def tile_values(geometry: Geometry, image: NDArray[np.uint8], tile: np.void) -> NDArray[np.float32]:
    """Read one tile back as fp32 ``[rows, cols]``; the reference that kernels and backends are tested against."""
    count = int(tile["rows"]) * int(tile["cols"])
    item = ITEM_BYTES[geometry.dtype]
    raw = image[tile["page"], tile["offset"] : int(tile["offset"]) + count * item]
    shape = (int(tile["rows"]), int(tile["cols"]))
    if geometry.dtype == "bfloat16":
        return from_bfloat16(raw.view(np.uint16)).reshape(shape)
    return raw.view(np.float32).reshape(shape)


def image_sha256(image: NDArray[np.uint8]) -> str:
    """Return the sha256 of an image's pages in order, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
