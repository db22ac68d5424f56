"""Makes the views of an adapter's tiles, once per load.

An adapter's image (`loraplex_common.adapter_image`) lies in pages of the pool. Tiles that lie one after another there are
one view where their form allows it: making and reading a view costs as much as the small product that it feeds.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from loraplex_common.adapter_image import ITEM_BYTES, KIND_A, KIND_B, AdapterSpec, Geometry, layout
from loraplex_common.flora import KIND_FLORA_A, KIND_FLORA_B
from loraplex_common.low_rank import LowRank
from loraplex_common.projections import Split
from loraplex_common.sparse_delta import KIND_COLUMNS, KIND_STARTS, KIND_VALUES, SparseDelta
from loraplex_common.vectors import KIND_BIAS, KIND_C, KIND_E, OutVector
from torch import Tensor

from loraplex_engine.runners.torch.adapter_views import (
    AdapterOp,
    ExpandTile,
    FactorTile,
    FloraSlice,
    Magnitudes,
    OtherParts,
    ShrinkTile,
    SparseSlice,
    VectorTile,
)
from loraplex_engine.runners.torch.outside_views import outside_views

if TYPE_CHECKING:
    from loraplex_common.part_kind import Part
    from numpy.typing import NDArray

    from loraplex_engine.runners.token_rows import RowIds


class AdapterTable:
    """Views of one adapter's tiles in the pool's pages.

    Attributes:
        num_ops: Ops of the model.
        has_other_parts: Whether a module has a part other than a pair.
        magnitudes: Magnitudes that c has to be computed from.
        outside: What it does outside of the decoder layers; None if nothing.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        pool: Tensor,
        row_ids: RowIds | None = None,
    ) -> None:
        """Make the views.

        Args:
            geometry: Geometry of the engine's images.
            spec: The adapter.
            pages: Page ids in image order.
            pool: The whole pool in the compute dtype, one-dimensional.
            row_ids: Tokens that it has rows of; None if it has none.
        """
        views = _Views(geometry, spec, pages, pool)
        self._ops = views.ops
        self.num_ops = len(geometry.ops)
        self.has_other_parts = any(op.others is not None for op in self._ops.values())
        self.magnitudes = list(views.magnitudes.values())
        self.outside = outside_views(geometry, spec, pages, pool, row_ids)

    def op(self, layer: int, op: str) -> AdapterOp | None:
        """Return what the adapter does in one fused projection of one layer, if anything."""
        return self._ops.get((layer, op))


class _Place(NamedTuple):
    """One slice of one op of one layer."""

    layer: int
    op: int
    slice: int


class _Views:
    """Makes an adapter's views, tile by tile in the image's order.

    Attributes:
        ops: By layer and op.
        magnitudes: By slice.
    """

    def __init__(self, geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32], pool: Tensor) -> None:
        self._geometry, self._pages, self._pool = geometry, pages.tolist(), pool
        self._item = ITEM_BYTES[geometry.dtype]
        self._parts: dict[tuple[int, int, int, str], Part] = {
            (module.layer, *geometry.place(module.layer, module.projection), part.kind): part
            for module in spec.modules
            for part in module.parts
        }
        outputs = [op.local_outputs(geometry.tp_degree) for op in geometry.ops]
        self._bounds = [list(itertools.accumulate(each, initial=0)) for each in outputs]
        self.ops: dict[tuple[int, str], AdapterOp] = {}
        self.magnitudes: dict[_Place, Magnitudes] = {}
        self._pair_slices: dict[tuple[int, int], list[int]] = {}  # slices of an op with a pair, in stacking order
        tiles = layout(geometry, spec.sizes).tiles
        if geometry.outside is not None:
            tiles = tiles[
                : np.searchsorted(tiles["layer"], geometry.outside)
            ]  # the last layer is none of the decoder's
        self._take_pairs(tiles)
        others = tiles[(tiles["kind"] != KIND_A) & (tiles["kind"] != KIND_B)]
        if len(others):
            self._take_others(others)

    def _op(self, layer: int, op: int) -> AdapterOp:
        key = (layer, self._geometry.ops[op].name)
        found = self.ops.get(key)
        if found is None:
            found = self.ops[key] = AdapterOp(op)
        return found

    # --- pairs ---

    def _take_pairs(self, tiles: NDArray[np.void]) -> None:
        for layer, op, _, _, start, rows, cols, page, offset in tiles[tiles["kind"] == KIND_A].tolist():
            view = self._view(page, offset, rows, cols)
            self._op(layer, op).shrink.append(ShrinkTile(start, start + cols, view))
        for layer, op, index, start, rows, cols, page, offset in _merged_b_tiles(tiles, self._item):
            slices, adapter = self._pair_slices.setdefault((layer, op), []), self._op(layer, op)
            if index not in slices:
                slices.append(index)
                adapter.slice_ranks.append(cols)
            part = self._parts[layer, op, index, LowRank.kind]
            assert isinstance(part, LowRank)
            first, view = self._bounds[op][index] + start, self._view(page, offset, rows, cols)
            adapter.expand.append(ExpandTile(first, first + rows, len(slices) - 1, view, part.scaling))

    def _view(self, page: int, offset: int, rows: int, cols: int) -> Tensor:
        start = (self._pages[page] * self._geometry.page_bytes + offset) // self._item
        return self._pool.as_strided((rows, cols), (cols, 1), start)

    # --- other parts ---

    def _take_others(self, tiles: NDArray[np.void]) -> None:
        wide = self._pool.view(torch.float32)
        pools = {
            KIND_VALUES: self._pool,
            KIND_COLUMNS: self._pool.view(torch.uint16),
            KIND_STARTS: self._pool.view(torch.int32),
        }
        for layer, op, entry, index, start, rows, cols, page, offset in tiles.tolist():
            pool = pools.get(entry, wide)
            begin = (self._pages[page] * self._geometry.page_bytes + offset) // pool.itemsize
            view = pool.as_strided((rows, cols), (cols, 1), begin)
            place = _Place(layer, op, index)
            others = self._others(place)
            if entry == KIND_E:
                others.in_factors.append(VectorTile(start, start + cols, view[0]))
            elif entry in (KIND_C, KIND_BIAS):
                first = self._bounds[op][index] + start
                self._take_output_vector(place, entry, VectorTile(first, first + cols, view[0]))
            elif entry in (KIND_FLORA_A, KIND_FLORA_B):
                flora = others.flora.setdefault(index, FloraSlice(*self._bounds_of(place), rows))
                (flora.a if entry == KIND_FLORA_A else flora.b).append(FactorTile(start, start + cols, view))
            else:
                self._pieces(place, entry).append(view[0])
        for adapter in self.ops.values():
            if adapter.others is not None:
                adapter.others.join()

    def _others(self, place: _Place) -> OtherParts:
        adapter = self._op(place.layer, place.op)
        if adapter.others is None:
            adapter.others = OtherParts()
        return adapter.others

    def _bounds_of(self, place: _Place) -> tuple[int, int]:
        """Return the slice's outputs in the op, ``[first, last)``."""
        return self._bounds[place.op][place.slice], self._bounds[place.op][place.slice + 1]

    def _take_output_vector(self, place: _Place, entry: int, tile: VectorTile) -> None:
        others = self._others(place)
        if entry == KIND_BIAS:
            others.biases.append(tile)
            return
        part = self._parts[*place, OutVector.kind]
        assert isinstance(part, OutVector)
        (others.bias_factors if part.scales_bias else others.factors).append(tile)
        if part.is_magnitude:
            found = self.magnitudes.get(place)
            if found is None:
                slices = self._pair_slices.get((place.layer, place.op), [])
                found = self.magnitudes[place] = Magnitudes(
                    place.layer,
                    self._geometry.ops[place.op].name,
                    *self._bounds_of(place),
                    part=slices.index(place.slice) if place.slice in slices else None,
                    sums_over_ranks=self._geometry.ops[place.op].projections[0].split is Split.INPUTS,
                )
            found.tiles.append(tile)

    def _pieces(self, place: _Place, entry: int) -> list[Tensor]:
        """Return the pieces of one of the three matrices of a sparse delta."""
        sparse = self._others(place).sparse
        found = sparse.get(place.slice)
        if found is None:
            part = self._parts[*place, SparseDelta.kind]
            assert isinstance(part, SparseDelta)
            found = sparse[place.slice] = SparseSlice(*self._bounds_of(place), part.scaling)
        return {KIND_VALUES: found.values, KIND_COLUMNS: found.columns, KIND_STARTS: found.begins}[entry]


def _merged_b_tiles(tiles: NDArray[np.void], item: int) -> list[list[int]]:
    """Return B tiles as [layer, op, slice, start, rows, cols, page, offset], with consecutive tiles merged."""
    merged: list[list[int]] = []
    for layer, op, _, slice_index, start, rows, cols, page, offset in tiles[tiles["kind"] == KIND_B].tolist():
        if merged:
            last = merged[-1]
            is_next = last[:3] == [layer, op, slice_index] and last[6] == page
            if is_next and offset == last[7] + last[4] * cols * item:
                last[4] += rows
                continue
        merged.append([layer, op, slice_index, start, rows, cols, page, offset])
    return merged
