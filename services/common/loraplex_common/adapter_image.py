"""The one definition of how an adapter lies in pages: packed by the store, read by the engine and its kernels.

An image is a stream of *tiles*. Per decoder layer, in the layer's order of fused projections ("ops"), and per op in the order
of `KINDS`, each kind of part contributes the tiles that it cuts its matrices into; `low_rank.py` says which for a pair.

A tile is at most ``min(32 KiB, page)``, starts on a 128-byte boundary and never straddles a page, so that kernels use
16-byte vectors or one bulk copy and a tile's address is (page id, offset). Waste: the end of each page and the last page.
Nothing here needs torch: numpy only.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from loraplex_common.adapter_parts import KINDS, AdapterSpec, ModuleSpec, PartSizes, pair_sizes
from loraplex_common.bfloat16 import from_bfloat16, is_finite, round_into, to_bfloat16
from loraplex_common.image_geometry import (
    ITEM_BYTES,
    LAYOUT_VERSION,
    TILE_ALIGN,
    TILE_BYTES,
    Geometry,
    ImageError,
)
from loraplex_common.low_rank import KIND_A, KIND_B, LOW_RANK
from loraplex_common.part_kind import FIXED_TYPES, TILE_STEPS, Arrays, EntryType, PartKind, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ITEM_BYTES", "KIND_A", "KIND_B", "LAYOUT_VERSION", "LOW_RANK", "TILE_ALIGN", "TILE_BYTES", "TILE_DTYPE", "TILE_STEPS",
    "AdapterSpec", "Geometry", "ImageError", "ImageLayout", "ModuleSpec", "PartSizes", "Tensors", "from_bfloat16",
    "image_sha256", "layout", "pack", "pair_sizes", "tile_values", "to_bfloat16",
]  # fmt: skip

TILE_DTYPE: Final = np.dtype(
    [
        ("layer", np.int32),
        ("op", np.int32),  # index into Geometry.ops
        ("kind", np.int32),  # the image entry of a kind of part: KIND_A, KIND_B, ...
        ("slice", np.int32),  # index into the op's projections; 0 for what all of them share
        ("start", np.int32),  # first column or output
        ("rows", np.int32),
        ("cols", np.int32),
        ("page", np.int32),  # index into the image's pages
        ("offset", np.int32),  # bytes into that page, a multiple of TILE_ALIGN
    ]
)

Tensors: TypeAlias = Mapping[tuple[int, str, str], Arrays]
"""(layer, projection, kind of part) -> its tensors, fp32, unsharded: of a pair A and B."""


Cuts: TypeAlias = dict[tuple[int, str, tuple[int, ...]], tuple[Tile, ...]]
"""(op, kind of part, sizes of its slices) -> its tiles, within one layout."""


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


@functools.lru_cache(maxsize=256)
def layout(geometry: Geometry, sizes: PartSizes) -> ImageLayout:
    """Lay an adapter whose parts have the given sizes out in pages.

    Raises:
        ImageError: If a layer, projection or kind does not exist, a part comes twice, or one does not fit a tile.
    """
    by_layer = _sizes_by_layer(geometry, sizes)
    cursor = _Cursor(geometry.page_bytes)
    cuts: Cuts = {}
    tiles = [
        tile for layer in sorted(by_layer) for tile in _layer_tiles(geometry, cursor, layer, by_layer[layer], cuts)
    ]
    table = np.array(tiles, dtype=TILE_DTYPE)
    table.setflags(write=False)
    return ImageLayout(table, -(-cursor.position // geometry.page_bytes), cursor.position)


def _sizes_by_layer(geometry: Geometry, sizes: PartSizes) -> dict[int, dict[tuple[str, str], int]]:
    """Check parts against the geometry; return, per layer, (projection, kind) -> size."""
    by_layer: dict[int, dict[tuple[str, str], int]] = {}
    for layer, projection, kind, size in sizes:
        geometry.projection(layer, projection)  # refuses one that does not exist
        if kind not in KINDS:
            raise ImageError(f"layer {layer} {projection}: part kind {kind!r} is not one of {', '.join(KINDS)}")
        if size <= 0:
            what = "rank" if kind == LOW_RANK else f"size of {kind}"
            raise ImageError(f"layer {layer} {projection}: {what} {size} is not positive")
        if (projection, kind) in by_layer.setdefault(layer, {}):
            raise ImageError(f"layer {layer} {projection} is adapted twice")
        by_layer[layer][projection, kind] = size
    return by_layer


def _layer_tiles(
    geometry: Geometry, cursor: _Cursor, layer: int, found: Mapping[tuple[str, str], int], cuts: Cuts
) -> Iterator[tuple[int, ...]]:
    """Place the tiles of one layer; an op is cut alike in all layers with parts of the same sizes."""
    for index in geometry.op_indices(layer).values():
        op = geometry.ops[index]
        for kind in KINDS.values():
            sizes = tuple(found.get((name, kind.name), 0) for name in op.slices)
            if not any(sizes):
                continue
            if (tiles := cuts.get((index, kind.name, sizes))) is None:
                tiles = cuts[index, kind.name, sizes] = tuple(kind.tiles(geometry, layer, op, sizes))
            for tile in tiles:
                item = kind.entries[tile.entry].item_bytes(geometry.dtype)
                yield (layer, index, *tile, *cursor.place(tile.rows * tile.cols * item))


def pack(geometry: Geometry, spec: AdapterSpec, tensors: Tensors, tp_rank: int = 0) -> NDArray[np.uint8]:
    """Build an adapter's image for one tensor-parallel rank.

    Returns:
        ``[num_pages, page_bytes]``, uint8; bytes that belong to no tile are zero.

    Raises:
        ImageError: If the tensors are not those that spec and geometry say, or a value is not finite in the dtype.
    """
    plan = layout(geometry, spec.sizes)
    sources = _local_parts(geometry, spec, tensors, tp_rank)
    image = np.zeros((plan.num_pages, geometry.page_bytes), dtype=np.uint8)
    writer = _TileWriter(geometry, image)
    for layer, op, entry, index, start, num_rows, num_cols, page, offset in plan.tiles.tolist():
        kind, parts = sources[layer, op, entry]
        tile, at = Tile(entry, index, start, num_rows, num_cols), page * geometry.page_bytes + offset
        if not writer.write(kind, tile, parts, at):
            name, is_per_slice, dtype = kind.entries[entry]
            which = f"{geometry.ops[op].slices[index]} {name}" if is_per_slice else name
            raise ImageError(
                f"layer {layer} {geometry.ops[op].name} {which} holds a value that is not finite in "
                f"{geometry.dtype if dtype == 'compute' else dtype}"
            )
    return image


class _TileWriter:
    """Writes tiles into an image in the types of their entries; its scratch serves all tiles."""

    def __init__(self, geometry: Geometry, image: NDArray[np.uint8]) -> None:
        num_items = geometry.tile_bytes // ITEM_BYTES["bfloat16"]
        self._stack, self._scratch = np.empty(num_items, dtype=np.float32), np.empty(num_items, dtype=np.uint32)
        flat = image.reshape(-1)
        self._views: dict[EntryType, NDArray[Any]] = {name: flat.view(dtype) for name, dtype in FIXED_TYPES.items()}
        self._views["compute"] = flat.view(np.uint16 if geometry.dtype == "bfloat16" else np.float32)

    def write(self, kind: PartKind, tile: Tile, parts: Sequence[Arrays | None], at: int) -> bool:
        """Write one tile at a byte of the image; return whether all its values are finite there."""
        entry, count = kind.entries[tile.entry], tile.rows * tile.cols
        view, shape = self._views[entry.dtype], (tile.rows, tile.cols)
        out = view[at // view.itemsize : at // view.itemsize + count]
        if entry.is_integer:
            kind.fill(tile, parts, out.reshape(shape))
            return True
        values = self._stack[:count]
        kind.fill(tile, parts, values.reshape(shape))
        return _encode_into(values, out, self._scratch[:count])


def _local_parts(
    geometry: Geometry, spec: AdapterSpec, tensors: Tensors, tp_rank: int
) -> dict[tuple[int, int, int], tuple[PartKind, Sequence[Arrays | None]]]:
    """Check the tensors' keys and shapes; return, by (layer, op, image entry), what one rank computes (views, no copies)."""
    expected = {(layer, projection, kind) for layer, projection, kind, _ in spec.sizes}
    if different := sorted(expected ^ set(tensors)):
        raise ImageError(f"layer {different[0][0]} {different[0][1]}: in only one of spec and tensors")
    if not 0 <= tp_rank < geometry.tp_degree:
        raise ImageError(f"tensor-parallel rank {tp_rank} does not exist: the degree is {geometry.tp_degree}")
    found: dict[tuple[int, int, int], tuple[PartKind, list[Arrays | None]]] = {}
    for layer, name, kind_name, size in spec.sizes:
        kind, projection, arrays = KINDS[kind_name], geometry.projection(layer, name), tensors[layer, name, kind_name]
        for (what, shape), array in zip(kind.shapes(projection, size).items(), arrays, strict=True):
            if array.shape != shape:
                raise ImageError(f"layer {layer} {name} {what} has shape {array.shape}, expected {shape}")
        op, slice_index = geometry.place(layer, name)
        for entry in kind.entries:
            parts = found.setdefault((layer, op, entry), (kind, [None] * len(geometry.ops[op].projections)))[1]
            parts[slice_index] = kind.local(projection, arrays, tp_rank, geometry.tp_degree)
    return {key: (kind, parts) for key, (kind, parts) in found.items()}


def _encode_into(values: NDArray[np.float32], out: NDArray[Any], scratch: NDArray[np.uint32]) -> bool:
    """Write ``values`` in the dtype of ``out`` (uint16 stands for bf16); return whether all are finite there."""
    if out.dtype == np.uint16:
        round_into(values, out, scratch)
        return is_finite(out)
    out[:] = values
    return bool(np.isfinite(values).all())


def tile_values(geometry: Geometry, image: NDArray[np.uint8], tile: np.void) -> NDArray[Any]:
    """Read one tile back as ``[rows, cols]``, integers as they are, else fp32; what kernels are tested against."""
    entry = next(kind.entries[int(tile["kind"])] for kind in KINDS.values() if int(tile["kind"]) in kind.entries)
    shape = (int(tile["rows"]), int(tile["cols"]))
    num_bytes = shape[0] * shape[1] * entry.item_bytes(geometry.dtype)
    raw = image[tile["page"], tile["offset"] : int(tile["offset"]) + num_bytes]
    if entry.dtype == "compute" and geometry.dtype == "bfloat16":
        return from_bfloat16(raw.view(np.uint16)).reshape(shape)
    return raw.view(FIXED_TYPES.get(entry.dtype, np.float32)).reshape(shape)


def image_sha256(image: NDArray[np.uint8]) -> str:
    """Return the sha256 of an image's pages in order, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
