"""What a step reads of an adapter's embedding and lm_head: views of tiles in the pool's pages, made once per load."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from loraplex_common.adapter_image import ITEM_BYTES, KIND_A, KIND_B, layout
from loraplex_common.projections import EMBED_OP, HEAD_OP
from loraplex_common.token_rows import KIND_ROW_VALUES
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

    from loraplex_engine.runners.token_rows import RowIds


class RowPiece(NamedTuple):
    """Rows ``[first, last)`` of an adapter's, which lie one after another: ``[last - first, hidden]``."""

    first: int
    last: int
    values: Tensor


@dataclass(frozen=True, slots=True)
class RowsView:
    """Rows that an adapter replaces or adds.

    Attributes:
        ids: int64 ``[n]``, ascending.
        begins: int64 ``[n]``; where each row begins in the pool.
        pieces: All rows, in order.
    """

    ids: Tensor
    begins: Tensor
    pieces: list[RowPiece]


class PairTile(NamedTuple):
    """Columns ``[start, stop)`` of A, ``[rank, stop - start]``, or outputs of B, ``[stop - start, rank]``."""

    start: int
    stop: int
    values: Tensor


@dataclass(frozen=True, slots=True)
class PairView:
    """A low-rank pair.

    Attributes:
        begins: int64 ``[tiles]``; where each tile of A begins in the pool.
        widths: int64 ``[tiles]``; its columns: as many in all tiles but the last.
    """

    rank: int
    scaling: float
    a: list[PairTile]
    b: list[PairTile]
    begins: Tensor
    widths: Tensor


@dataclass(frozen=True, slots=True)
class OutsideModule:
    """What an adapter does to the embedding or to lm_head."""

    pair: PairView | None
    rows: RowsView | None


@dataclass(frozen=True, slots=True)
class OutsideViews:
    """What an adapter does outside of the decoder layers; one of the two is not None."""

    embed: OutsideModule | None
    head: OutsideModule | None


def outside_views(
    geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32], pool: Tensor, ids: RowIds | None
) -> OutsideViews | None:
    """Return an adapter's views; None if it does nothing outside of the decoder layers.

    Args:
        geometry: Geometry of the engine's images.
        spec: The adapter.
        pages: Page ids in image order.
        pool: The whole pool in the compute dtype, one-dimensional.
        ids: Tokens of its rows; None if it has none.
    """
    outside = geometry.outside
    modules = {module.projection: module for module in spec.modules if module.layer == outside}
    if outside is None or not modules:
        return None
    tiles = layout(geometry, spec.sizes).tiles
    tiles = tiles[tiles["layer"] == outside]
    found: dict[str, OutsideModule] = {}
    for module in modules.values():
        op, _ = geometry.place(outside, module.projection)
        name, mine = geometry.ops[op].name, _Tiles(geometry, tiles[tiles["op"] == op], pages, pool)
        pair = None if module.pair is None else mine.pair(module.rank, module.scaling)
        own_ids = None if ids is None else (ids.embed if name == EMBED_OP else ids.head)
        rows = None if own_ids is None or not own_ids.size else mine.rows(own_ids)
        found[name] = OutsideModule(pair, rows)
    return OutsideViews(found.get(EMBED_OP), found.get(HEAD_OP))


class _Tiles:
    """An adapter's tiles of one module."""

    def __init__(self, geometry: Geometry, tiles: NDArray[np.void], pages: NDArray[np.int32], pool: Tensor) -> None:
        self._tiles, self._pool = tiles, pool
        at = pages.astype(np.int64)[tiles["page"]] * geometry.page_bytes + tiles["offset"]
        self._begins = at // ITEM_BYTES[geometry.dtype]

    def pair(self, rank: int, scaling: float) -> PairView:
        """Return the views of the pair."""
        a, b = self._of(KIND_A), self._of(KIND_B)
        widths = self._tiles["cols"][a].astype(np.int64)
        return PairView(
            rank,
            scaling,
            self._pieces(a, "cols"),
            self._pieces(b, "rows"),
            self._upload(self._begins[a]),
            self._upload(widths),
        )

    def rows(self, ids: NDArray[np.int32]) -> RowsView:
        """Return the views of the rows of these tokens."""
        values = self._of(KIND_ROW_VALUES)
        tiles, begins = self._tiles[values], self._begins[values]
        counts, width = tiles["rows"].astype(np.int64), int(tiles["cols"][0])
        within = np.arange(len(ids)) - np.repeat(tiles["start"].astype(np.int64), counts)
        row_begins = np.repeat(begins, counts) + within * width
        breaks = np.flatnonzero(np.diff(row_begins) != width) + 1
        bounds = [0, *breaks.tolist(), len(ids)]
        pieces = [
            RowPiece(first, last, self._pool.as_strided((last - first, width), (width, 1), int(row_begins[first])))
            for first, last in itertools.pairwise(bounds)
        ]
        return RowsView(self._upload(ids.astype(np.int64)), self._upload(row_begins), pieces)

    def _of(self, entry: int) -> NDArray[np.intp]:
        found: NDArray[np.intp] = np.flatnonzero(self._tiles["kind"] == entry)
        return found

    def _pieces(self, chosen: NDArray[np.intp], length: str) -> list[PairTile]:
        pieces = []
        for begin, tile in zip(self._begins[chosen].tolist(), self._tiles[chosen], strict=True):
            start, rows, cols = int(tile["start"]), int(tile["rows"]), int(tile["cols"])
            view = self._pool.as_strided((rows, cols), (cols, 1), begin)
            pieces.append(PairTile(start, start + int(tile[length]), view))
        return pieces

    def _upload(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._pool.device)
