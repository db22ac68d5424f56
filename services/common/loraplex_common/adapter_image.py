"""The one definition of how an adapter lies in pages: packed by the store, read by the engine and its kernels.

An image is a stream of *tiles*. Per decoder layer, in the order qkv, o, gate_up, down, each fused projection ("op")
contributes first its A tiles, then its B tiles:

* **A tile** ``[R][k]``, row-major: columns ``[start, start + k)`` of the A matrices of all slices of the op, stacked
  (``R`` = sum of the slices' ranks), so that one pass over ``x`` serves q, k and v together.
* **B tile** ``[n][r]``, row-major: outputs ``[start, start + n)`` of one slice's B matrix with its own exact rank.

A tile is at most ``min(32 KiB, page)``, starts on a 128-byte boundary and never straddles a page, so that kernels use
16-byte vectors or one bulk copy and a tile's address is (page id, offset). ``k`` and ``n`` are multiples of 64 (of
32, 16 or 8 where the rank is so large that 64 columns exceed a tile: more than 256 stacked in bf16) except in the last
tile of a matrix; with 64, neighbouring B tiles in a page are contiguous. Waste: the end of each page and the last page. Scaling is not folded in (docs/lora-path.md). Nothing here needs torch: numpy only.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraplex_common.bfloat16 import from_bfloat16, is_finite, round_into, to_bfloat16
from loraplex_common.image_geometry import (
    ITEM_BYTES,
    LAYOUT_VERSION,
    OP_INDEX,
    OP_SLICES,
    OPS,
    PROJECTIONS,
    ROW_PARALLEL,
    TILE_ALIGN,
    TILE_BYTES,
    AdapterSpec,
    Geometry,
    ImageError,
    ModuleSpec,
    Ranks,
)

__all__ = [
    "ITEM_BYTES", "KIND_A", "KIND_B", "LAYOUT_VERSION", "OPS", "OP_INDEX", "OP_SLICES", "PROJECTIONS", "ROW_PARALLEL", "TILE_ALIGN",
    "TILE_BYTES", "TILE_DTYPE", "TILE_STEPS", "AdapterSpec", "Geometry", "ImageError", "ImageLayout", "ModuleSpec", "Ranks", "Tensors", "from_bfloat16",
    "image_sha256", "layout", "pack", "slice_rows", "tile_values", "to_bfloat16",
]  # fmt: skip

# k and n are multiples of the first of these that fits a tile: of 64, so that tiles stay aligned without padding; of
# less where the (stacked) rank is so large that 64 exceed a tile; of 8 at least, for 16-byte vectors of bf16.
TILE_STEPS: Final = (64, 32, 16, 8)
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

Tensors: TypeAlias = Mapping[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(layer, projection) -> (A ``[rank, in_features]``, B ``[out_features, rank]``), fp32, unsharded."""


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
    for granule in TILE_STEPS:
        if step := tile_bytes // unit_bytes // granule * granule:
            break
    else:
        if length * unit_bytes > tile_bytes:
            least = TILE_STEPS[-1] * unit_bytes
            raise ImageError(
                f"{what}: {TILE_STEPS[-1]} x {unit_bytes} = {least} bytes exceed a tile of {tile_bytes} bytes"
            )
        step = length
    return [(start, min(start + step, length)) for start in range(0, length, step)]


@functools.lru_cache(maxsize=256)
def layout(geometry: Geometry, ranks: Ranks) -> ImageLayout:
    """Lay an adapter of the given modules out in pages.

    Raises:
        ImageError: If a layer or projection does not exist or comes twice, or a stacked rank is too large for a tile.
    """
    by_layer = _ranks_by_layer(geometry, ranks)
    cursor = _Cursor(geometry.page_bytes)
    tiles = [
        tile
        for layer in sorted(by_layer)
        for op, slices in OPS.items()
        if not by_layer[layer].keys().isdisjoint(slices)
        for tile in _op_tiles(geometry, cursor, layer, op, by_layer[layer])
    ]
    table = np.array(tiles, dtype=TILE_DTYPE)
    table.setflags(write=False)
    return ImageLayout(table, -(-cursor.position // geometry.page_bytes), cursor.position)


@functools.lru_cache(maxsize=256)
def slice_rows(ranks: Ranks) -> Mapping[tuple[int, str], tuple[int, int]]:
    """Return, by (layer, projection), the half-open rows that a slice takes in its op's stacked A.

    Only adapted projections take rows: with q and v but no k, v's rows follow q's.
    """
    rank_of = {(layer, projection): rank for layer, projection, rank in ranks}
    rows: dict[tuple[int, str], tuple[int, int]] = {}
    for layer in sorted({layer for layer, _, _ in ranks}):
        for slices in OPS.values():
            stop = 0
            for projection in slices:
                if (layer, projection) in rank_of:
                    start, stop = stop, stop + rank_of[layer, projection]
                    rows[layer, projection] = (start, stop)
    return types.MappingProxyType(rows)


def _ranks_by_layer(geometry: Geometry, ranks: Ranks) -> dict[int, dict[str, int]]:
    by_layer: dict[int, dict[str, int]] = {}
    for layer, projection, rank in ranks:
        if not 0 <= layer < geometry.num_layers:
            raise ImageError(f"layer {layer} does not exist: the base model has {geometry.num_layers}")
        if projection not in PROJECTIONS:
            raise ImageError(f"projection {projection!r} is not one of {', '.join(PROJECTIONS)}")
        if rank <= 0:
            raise ImageError(f"layer {layer} {projection}: rank {rank} is not positive")
        if projection in by_layer.setdefault(layer, {}):
            raise ImageError(f"layer {layer} {projection} is adapted twice")
        by_layer[layer][projection] = rank
    return by_layer


def _op_tiles(
    geometry: Geometry, cursor: _Cursor, layer: int, op: str, rank_of: Mapping[str, int]
) -> Iterator[tuple[int, ...]]:
    """Place the tiles of one fused projection: A, then each slice's B."""
    item = ITEM_BYTES[geometry.dtype]
    present = [(index, name, rank_of[name]) for index, name in enumerate(OPS[op]) if name in rank_of]
    stacked = sum(rank for _, _, rank in present)
    columns = geometry.local_shape(OPS[op][0])[0]
    for start, stop in _steps(
        columns, stacked * item, geometry.tile_bytes, f"layer {layer} {op}: stacked rank {stacked}"
    ):
        place = cursor.place((stop - start) * stacked * item)
        yield (layer, OP_INDEX[op], KIND_A, 0, start, stacked, stop - start, *place)
    for index, name, rank in present:
        outputs = geometry.local_shape(name)[1]
        for start, stop in _steps(outputs, rank * item, geometry.tile_bytes, f"layer {layer} {name}: rank {rank}"):
            place = cursor.place((stop - start) * rank * item)
            yield (layer, OP_INDEX[op], KIND_B, index, start, stop - start, rank, *place)


def pack(geometry: Geometry, spec: AdapterSpec, tensors: Tensors, tp_rank: int = 0) -> NDArray[np.uint8]:
    """Build an adapter's image for one tensor-parallel rank.

    Returns:
        ``[num_pages, page_bytes]``, uint8; bytes that belong to no tile are zero.

    Raises:
        ImageError: If the tensors are not those that spec and geometry say, or a value is not finite in the dtype.
    """
    plan = layout(geometry, spec.ranks)
    rows = slice_rows(spec.ranks)
    local = _local_tensors(geometry, spec, tensors, tp_rank)
    image = np.zeros((plan.num_pages, geometry.page_bytes), dtype=np.uint8)
    stack = np.empty(geometry.tile_bytes // ITEM_BYTES[geometry.dtype], dtype=np.float32)
    scratch = np.empty(stack.size, dtype=np.uint32)
    flat = image.reshape(-1).view(np.uint16 if geometry.dtype == "bfloat16" else np.float32)
    for layer, op, kind, index, start, num_rows, num_cols, page, offset in plan.tiles.tolist():
        values = stack[: num_rows * num_cols]
        tile = values.reshape(num_rows, num_cols)
        slices = OP_SLICES[op]
        if kind == KIND_A:
            for name in slices:
                if (layer, name) in rows:
                    first, last = rows[layer, name]
                    tile[first:last] = local[layer, name][0][:, start : start + num_cols]
        else:
            tile[:] = local[layer, slices[index]][1][start : start + num_rows]
        first = (page * geometry.page_bytes + offset) // flat.itemsize
        if not _encode_into(values, flat[first : first + values.size], scratch[: values.size]):
            which = "A" if kind == KIND_A else f"{slices[index]} B"
            raise ImageError(
                f"layer {layer} {tuple(OPS)[op]} {which} holds a value that is not finite in {geometry.dtype}"
            )
    return image


def _local_tensors(geometry: Geometry, spec: AdapterSpec, tensors: Tensors, tp_rank: int) -> Tensors:
    """Check the tensors' keys and shapes; cut them to what one rank computes (views, no copies)."""
    expected_keys = {(layer, projection) for layer, projection, _ in spec.ranks}
    if different := sorted(expected_keys ^ set(tensors)):
        raise ImageError(f"layer {different[0][0]} {different[0][1]}: in only one of spec and tensors")
    if not 0 <= tp_rank < geometry.tp_degree:
        raise ImageError(f"tensor-parallel rank {tp_rank} does not exist: the degree is {geometry.tp_degree}")
    local: dict[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for layer, projection, rank in spec.ranks:
        columns, outputs = geometry.projection_shape(projection)
        a, b = tensors[layer, projection]
        for name, tensor, expected in (("lora_A", a, (rank, columns)), ("lora_B", b, (outputs, rank))):
            if tensor.shape != expected:
                raise ImageError(f"layer {layer} {projection} {name} has shape {tensor.shape}, expected {expected}")
        local_columns, local_outputs = geometry.local_shape(projection)
        if projection in ROW_PARALLEL:
            local[layer, projection] = (a[:, tp_rank * local_columns : (tp_rank + 1) * local_columns], b)
        else:
            local[layer, projection] = (a, b[tp_rank * local_outputs : (tp_rank + 1) * local_outputs])
    return local


def _encode_into(values: NDArray[np.float32], out: NDArray[Any], scratch: NDArray[np.uint32]) -> bool:
    """Write ``values`` in the dtype of ``out`` (uint16 stands for bf16); return whether all are finite there."""
    if out.dtype == np.uint16:
        round_into(values, out, scratch)
        return is_finite(out)
    out[:] = values
    return bool(np.isfinite(values).all())


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
