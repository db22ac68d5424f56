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
from loraplex_common.adapter_image import ITEM_BYTES, KIND_A, KIND_B, AdapterSpec, Geometry, layout
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ShrinkTile(NamedTuple):
    """Columns ``[start, stop)`` of the stacked A matrices: ``[stacked_rank, stop - start]``."""

    start: int
    stop: int
    a: Tensor


class ExpandTile(NamedTuple):
    """Outputs ``[start, stop)`` of one slice's B: ``[stop - start, rank]``.

    Attributes:
        part: Index among the op's adapted slices.
    """

    start: int
    stop: int
    part: int
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterOp:
    """One adapter's part of one fused projection of one layer.

    Attributes:
        index: The op's place in ``Geometry.ops``.
        slice_ranks: Ranks of the adapted slices, in the order in which A stacks them.
    """

    index: int
    shrink: tuple[ShrinkTile, ...]
    expand: tuple[ExpandTile, ...]
    slice_ranks: list[int]


class AdapterTable:
    """Views of one adapter's tiles in the pool's pages."""

    def __init__(self, geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32], pool: Tensor) -> None:
        """Make the views.

        Args:
            geometry: Geometry of the engine's images.
            spec: The adapter.
            pages: Page ids in image order.
            pool: The whole pool in the compute dtype, one-dimensional.
        """
        self._item = ITEM_BYTES[geometry.dtype]
        self._page_items = geometry.page_bytes // self._item
        self._pages = pages
        self._pool = pool
        self.num_ops = len(geometry.ops)
        scalings = {
            (module.layer, *geometry.place(module.layer, module.projection)): module.pair.scaling
            for module in spec.modules
            if module.pair is not None
        }
        shrinks: dict[tuple[int, int], list[ShrinkTile]] = {}
        expands: dict[tuple[int, int], list[ExpandTile]] = {}
        slices: dict[tuple[int, int], dict[int, int]] = {}  # (layer, op) -> slice -> rank, in stacking order
        tiles = layout(geometry, spec.sizes).tiles
        for layer, op, _, _, start, rows, cols, page, offset in tiles[tiles["kind"] == KIND_A].tolist():
            view = self._view(page, offset, rows, cols)
            shrinks.setdefault((layer, op), []).append(ShrinkTile(start, start + cols, view))
        for layer, op, index, start, rows, cols, page, offset in _merged_b_tiles(tiles, self._item):
            ranks = slices.setdefault((layer, op), {})
            ranks[index] = cols
            base = sum(geometry.ops[op].local_outputs(geometry.tp_degree)[:index]) + start
            view = self._view(page, offset, rows, cols)
            tile = ExpandTile(base, base + rows, list(ranks).index(index), view, scalings[layer, op, index])
            expands.setdefault((layer, op), []).append(tile)
        self._ops = {
            (layer, geometry.ops[op].name): AdapterOp(
                op, tuple(shrinks[layer, op]), tuple(expands[layer, op]), list(slices[layer, op].values())
            )
            for layer, op in shrinks
        }

    def _view(self, page: int, offset: int, rows: int, cols: int) -> Tensor:
        start = int(self._pages[page]) * self._page_items + offset // self._item
        return self._pool.as_strided((rows, cols), (cols, 1), start)

    def op(self, layer: int, op: str) -> AdapterOp | None:
        """Return what the adapter does in one fused projection of one layer, if anything."""
        return self._ops.get((layer, op))


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


class Segment:
    """Tokens ``[first, last)`` of a step, all of one adapter.

    All layers share their input and output buffers, so the views that a tile needs are made once per step: making one
    costs as much as the small product it feeds.
    """

    def __init__(self, *, first: int, last: int, table: AdapterTable, scales: Tensor | None) -> None:
        """Describe a segment.

        Args:
            first: First token.
            last: One past the last token.
            table: The adapter.
            scales: fp32 ``[last - first]``, the requests' own factors; None if all are 1.
        """
        self.table = table
        self.scales = scales
        self._tokens = slice(first, last)
        self._inputs: list[dict[int, Tensor]] = [{} for _ in range(table.num_ops)]
        self._outputs: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(table.num_ops)]

    def input_of(self, op: int, x: Tensor, start: int, stop: int) -> Tensor:
        """Return columns [start, stop) of the segment's rows of an op's input, transposed: ``[stop - start, tokens]``."""
        key = start << 32 | stop
        view = self._inputs[op].get(key)
        if view is None:
            view = self._inputs[op][key] = x[self._tokens, start:stop].t()
        return view

    def output_of(self, op: int, y: Tensor, start: int, stop: int) -> Tensor:
        """Return columns [start, stop) of the segment's rows of an op's output, transposed: ``[stop - start, tokens]``."""
        key = (start, stop)
        view = self._outputs[op].get(key)
        if view is None:
            view = self._outputs[op][key] = y[self._tokens, start:stop].t()
        return view


class LoraStep:
    """Adapters of one step; built once, applied to every fused projection of every layer."""

    def __init__(self, segments: list[Segment], dtype: torch.dtype) -> None:
        self._segments = segments
        self._apply = _apply_fp32 if dtype == torch.float32 else _apply_widened

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor) -> None:
        """Add the adapters' part to a fused projection.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            x: The projection's input, ``[T, in_features]``; the same buffer for this op in every layer.
            y: Its output, ``[T, out_features]``; likewise, and added to in place.
        """
        for segment in self._segments:
            adapter = segment.table.op(layer, op)
            if adapter is not None:
                self._apply(adapter, segment, x, y)


def _apply_fp32(adapter: AdapterOp, segment: Segment, x: Tensor, y: Tensor) -> None:
    """Compute with weights as the left factor: for a few tokens a quarter faster than ``x @ A.T`` in either memory order."""
    op = adapter.index
    (start, stop, a), *more = adapter.shrink
    shrunk = torch.mm(a, segment.input_of(op, x, start, stop))
    for start, stop, a in more:
        shrunk.addmm_(a, segment.input_of(op, x, start, stop))
    if segment.scales is not None:
        shrunk.mul_(segment.scales)
    parts = torch.split(shrunk, adapter.slice_ranks) if len(adapter.slice_ranks) > 1 else (shrunk,)
    for start, stop, part, b, scaling in adapter.expand:
        segment.output_of(op, y, start, stop).addmm_(b, parts[part], alpha=scaling)


def _apply_widened(adapter: AdapterOp, segment: Segment, x: Tensor, y: Tensor) -> None:
    """Compute in fp32 and round once, at the end: the reference of kernels with fp32 accumulators."""
    op = adapter.index
    shrunk = sum(a.float() @ segment.input_of(op, x, start, stop).float() for start, stop, a in adapter.shrink)
    assert isinstance(shrunk, torch.Tensor)
    if segment.scales is not None:
        shrunk.mul_(segment.scales)
    parts = torch.split(shrunk, adapter.slice_ranks)
    for start, stop, part, b, scaling in adapter.expand:
        out = segment.output_of(op, y, start, stop)
        out.copy_(out.float().addmm_(b.float(), parts[part], alpha=scaling))
