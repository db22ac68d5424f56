"""LoRA over the unified pool, in torch: any mix of adapters and ranks in one step, read straight from pool pages.

An adapter's image (`loraplex_common.adapter_image`) lies in pages of the pool; `AdapterTable` holds strided views of
its tiles, made once per load. A step's rows are ordered by adapter, so each adapter's tokens are one *segment*:

    y[segment, outputs] += scaling * (x[segment] @ A.T) @ B.T

Tokens without an adapter are in no segment and cost nothing.

Source: Hu et al., "LoRA", arXiv:2106.09685; batching by segments as SGMV in Chen et al., "Punica", arXiv:2310.18547.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from loraplex_common.adapter_image import ITEM_BYTES, KIND_A, OP_INDEX, OPS, AdapterSpec, Geometry, layout
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ShrinkTile(NamedTuple):
    """Columns ``[start, stop)`` of the stacked A matrices, transposed: ``[stop - start, stacked_rank]``."""

    start: int
    stop: int
    a_t: Tensor


class ExpandTile(NamedTuple):
    """Outputs ``[start, stop)`` of one slice's B, transposed ``[rank, stop - start]``, reading stacked ranks [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    b_t: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterOp:
    """One adapter's part in one fused projection of one layer."""

    shrink: tuple[ShrinkTile, ...]
    expand: tuple[ExpandTile, ...]


class AdapterTable:
    """Views of one adapter's tiles in the pool's pages."""

    def __init__(self, geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32], pool: Tensor) -> None:
        """Make the views.

        Args:
            geometry: Of the engine's images.
            spec: The adapter.
            pages: Page ids in image order.
            pool: The whole pool in the compute dtype, one-dimensional.
        """
        self._item = ITEM_BYTES[geometry.dtype]
        self._page_items = geometry.page_bytes // self._item
        self._pages = pages
        self._pool = pool
        ranks = {(module.layer, module.projection): module for module in spec.modules}
        shrinks: dict[tuple[int, int], list[ShrinkTile]] = {}
        expands: dict[tuple[int, int], list[ExpandTile]] = {}
        tiles = layout(geometry, spec.ranks).tiles
        for tile in tiles[tiles["kind"] == KIND_A].tolist():
            layer, op, _, _, start, rows, cols, page, offset = tile
            view = self._view(page, offset, rows, cols)
            shrinks.setdefault((layer, op), []).append(ShrinkTile(start, start + cols, view.t()))
        outputs = _OutputOffsets(geometry)
        for layer, op, slice_index, start, rows, cols, page, offset in _merged_b_tiles(tiles, self._item):
            names = list(OPS.values())[op]
            low = sum(ranks[layer, name].rank for name in names[:slice_index] if (layer, name) in ranks)
            base = outputs.of(op, slice_index) + start
            view = self._view(page, offset, rows, cols).t()
            scaling = ranks[layer, names[slice_index]].scaling
            tile = ExpandTile(base, base + rows, low, low + cols, view, scaling)
            expands.setdefault((layer, op), []).append(tile)
        self._ops = {key: AdapterOp(tuple(shrinks[key]), tuple(expands[key])) for key in shrinks}

    def _view(self, page: int, offset: int, rows: int, cols: int) -> Tensor:
        start = int(self._pages[page]) * self._page_items + offset // self._item
        return self._pool.as_strided((rows, cols), (cols, 1), start)

    def op(self, layer: int, op: int) -> AdapterOp | None:
        """Return what the adapter does in one fused projection of one layer, if anything."""
        return self._ops.get((layer, op))


class _OutputOffsets:
    """Where each slice's outputs begin in its fused projection."""

    def __init__(self, geometry: Geometry) -> None:
        self._offsets: list[list[int]] = []
        for names in OPS.values():
            widths = [geometry.local_shape(name)[1] for name in names]
            self._offsets.append([sum(widths[:index]) for index in range(len(widths))])

    def of(self, op: int, slice_index: int) -> int:
        return self._offsets[op][slice_index]


def _merged_b_tiles(tiles: NDArray[np.void], item: int) -> list[list[int]]:
    """Return B tiles as [layer, op, slice, start, rows, cols, page, offset], those that follow each other merged."""
    merged: list[list[int]] = []
    for layer, op, _, slice_index, start, rows, cols, page, offset in tiles[tiles["kind"] != KIND_A].tolist():
        if merged:
            last = merged[-1]
            is_next = last[:3] == [layer, op, slice_index] and last[6] == page
            if is_next and offset == last[7] + last[4] * cols * item:
                last[4] += rows
                continue
        merged.append([layer, op, slice_index, start, rows, cols, page, offset])
    return merged


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens ``[first, last)`` of a step, all of one adapter.

    Attributes:
        scales: fp32 ``[last - first, 1]``, the requests' own factors; None if all are 1.
    """

    first: int
    last: int
    table: AdapterTable
    scales: Tensor | None


class LoraStep:
    """Adapters of one step; built once, applied to every fused projection of every layer."""

    def __init__(self, segments: list[Segment], dtype: torch.dtype) -> None:
        self._segments = segments
        self._dtype = dtype

    def apply(self, layer: int, op: int, x: Tensor, y: Tensor) -> None:
        """Add the adapters' part to a fused projection.

        Args:
            layer: Decoder layer.
            op: Index into ``OPS``.
            x: The projection's input, ``[T, in_features]``.
            y: Its output, ``[T, out_features]``; added to in place.
        """
        for segment in self._segments:
            adapter = segment.table.op(layer, op)
            if adapter is None:
                continue
            rows = x[segment.first : segment.last]
            if self._dtype == torch.float32:
                self._apply_fp32(adapter, segment, rows, y)
            else:
                self._apply_widened(adapter, segment, rows, y)

    @staticmethod
    def _apply_fp32(adapter: AdapterOp, segment: Segment, rows: Tensor, y: Tensor) -> None:
        tile = adapter.shrink[0]
        shrunk = torch.mm(rows[:, tile.start : tile.stop], tile.a_t)
        for tile in adapter.shrink[1:]:
            shrunk.addmm_(rows[:, tile.start : tile.stop], tile.a_t)
        if segment.scales is not None:
            shrunk.mul_(segment.scales)
        out = y[segment.first : segment.last]
        for start, stop, low, high, b_t, scaling in adapter.expand:
            out[:, start:stop].addmm_(shrunk[:, low:high], b_t, alpha=scaling)

    @staticmethod
    def _apply_widened(adapter: AdapterOp, segment: Segment, rows: Tensor, y: Tensor) -> None:
        """Compute in fp32 and round once, at the end: the reference of what kernels do with fp32 accumulators."""
        wide = rows.float()
        shrunk = wide.new_zeros((rows.shape[0], adapter.shrink[0].a_t.shape[1]))
        for tile in adapter.shrink:
            shrunk.addmm_(wide[:, tile.start : tile.stop], tile.a_t.float())
        if segment.scales is not None:
            shrunk.mul_(segment.scales)
        out = y[segment.first : segment.last]
        for start, stop, low, high, b_t, scaling in adapter.expand:
            part = out[:, start:stop]
            part.copy_(part.float().addmm_(shrunk[:, low:high], b_t.float(), alpha=scaling))


def op_index(op: str) -> int:
    """Return the index of a fused projection by its name in ``OPS``."""
    return OP_INDEX[op]
