"""Where each tile of an adapter's image lies; see `adapter_image` for what a tile is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np

from loraplex_common.adapter_parts import KINDS, PartSizes
from loraplex_common.image_geometry import TILE_ALIGN, Geometry, ImageError
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.part_kind import Tile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

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
