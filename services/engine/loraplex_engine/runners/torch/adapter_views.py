"""What a step reads of an adapter: views of tiles in the pool's pages, by layer and fused projection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class ShrinkTile(NamedTuple):
    """Columns ``[start, stop)`` of the stacked A matrices: ``[stacked_rank, stop - start]``."""

    start: int
    stop: int
    a: Tensor


class ExpandTile(NamedTuple):
    """Outputs ``[start, stop)`` of one slice's B: ``[stop - start, rank]``.

    Attributes:
        part: Index among the op's slices with a pair.
    """

    start: int
    stop: int
    part: int
    b: Tensor
    scaling: float


class VectorTile(NamedTuple):
    """Values ``[stop - start]``, fp32, for columns or outputs ``[start, stop)`` of the op."""

    start: int
    stop: int
    values: Tensor


class FactorTile(NamedTuple):
    """FLoRA's factors ``[rank, stop - start]``, fp32, for columns ``[start, stop)`` or outputs of the slice."""

    start: int
    stop: int
    values: Tensor


@dataclass(slots=True)
class SparseSlice:
    """The sparse delta of outputs ``[first, last)`` of the op, in the pieces in which it lies in the pool.

    Attributes:
        scaling: Factor on the product.
        values: Pieces of the values, in the compute dtype.
        columns: Pieces of the values' columns, uint16.
        begins: Pieces of where each output's values begin, int32; ``last - first + 1`` together.
    """

    first: int
    last: int
    scaling: float
    values: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    begins: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class FloraSlice:
    """FLoRA on outputs ``[first, last)`` of the op."""

    first: int
    last: int
    rank: int
    a: list[FactorTile] = field(default_factory=list)
    b: list[FactorTile] = field(default_factory=list)


@dataclass(slots=True)
class OtherParts:
    """What an adapter does in one op besides its pairs.

    Attributes:
        in_factors: e.
        factors: c that leaves the base's bias alone.
        bias_factors: c that multiplies the base's bias too.
        biases: b.
    """

    in_factors: list[VectorTile] = field(default_factory=list)
    factors: list[VectorTile] = field(default_factory=list)
    bias_factors: list[VectorTile] = field(default_factory=list)
    biases: list[VectorTile] = field(default_factory=list)
    sparse: dict[int, SparseSlice] = field(default_factory=dict)
    flora: dict[int, FloraSlice] = field(default_factory=dict)

    def join(self) -> None:
        """Make one view of vectors' tiles that lie one after another, of the whole op where it can be."""
        for tiles in (self.in_factors, self.factors, self.bias_factors, self.biases):
            tiles[:] = _joined_tiles(tiles)
        for sparse in self.sparse.values():
            for pieces in (sparse.values, sparse.columns, sparse.begins):
                pieces[:] = _joined_views(pieces)


@dataclass(slots=True)
class AdapterOp:
    """One adapter's part of one fused projection of one layer.

    Attributes:
        index: The op's place in ``Geometry.ops``.
        slice_ranks: Ranks of the slices with a pair, in the order in which A stacks them.
        others: Parts other than pairs; None if there are none.
    """

    index: int
    shrink: list[ShrinkTile] = field(default_factory=list)
    expand: list[ExpandTile] = field(default_factory=list)
    slice_ranks: list[int] = field(default_factory=list)
    others: OtherParts | None = None

    def pair(self, part: int) -> tuple[Tensor, Tensor, float]:
        """Return copies in fp32 of one slice's A ``[rank, in_features]`` and B ``[outputs, rank]``, and the scaling."""
        first = sum(self.slice_ranks[:part])
        rows = slice(first, first + self.slice_ranks[part])
        expand = [tile for tile in self.expand if tile.part == part]
        a = [tile.a[rows].float() for tile in self.shrink]
        return _joined(a, dim=1), _joined([tile.b.float() for tile in expand], dim=0), expand[0].scaling


@dataclass(slots=True)
class Magnitudes:
    """DoRA's magnitudes of outputs ``[first, last)`` of an op: they lie where c is to be.

    Attributes:
        part: Which of the adapter's pairs in the op is the slice's; None if it has none.
        sums_over_ranks: Whether tensor-parallel ranks have parts of each row of W.
    """

    layer: int
    op: str
    first: int
    last: int
    part: int | None
    sums_over_ranks: bool = False
    tiles: list[VectorTile] = field(default_factory=list)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _joined_tiles(tiles: list[VectorTile]) -> list[VectorTile]:
    """Join tiles that follow each other both in the vector and in memory."""
    joined: list[VectorTile] = []
    for tile in tiles:
        last = joined[-1] if joined else None
        if last is not None and last.stop == tile.start and _is_next(last.values, tile.values):
            joined[-1] = VectorTile(last.start, tile.stop, _span(last.values, tile.values))
        else:
            joined.append(tile)
    return joined


def _joined_views(views: list[Tensor]) -> list[Tensor]:
    joined: list[Tensor] = []
    for view in views:
        if joined and _is_next(joined[-1], view):
            joined.append(_span(joined.pop(), view))
        else:
            joined.append(view)
    return joined


def _is_next(one: Tensor, other: Tensor) -> bool:
    return one.storage_offset() + len(one) == other.storage_offset()


def _span(one: Tensor, other: Tensor) -> Tensor:
    return one.as_strided((len(one) + len(other),), (1,))
