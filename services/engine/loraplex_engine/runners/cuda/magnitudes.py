"""DoRA's factors: ``c = m / ||W + s B A||``, the norm of each row, from the engine's own weights.

    ||W + s B A||^2 = ||W||^2 + sum over r of s B[:, r] * (2 W A^T + s B A A^T)[:, r]

so that W is read once and W + s B A is never made. All of it is fp32 but the product W A^T, whose inputs are what the kernels
multiply with. ||W||^2 is kept per base. Both terms add up over ranks that have some columns of W each. Nothing here knows of streams or threads: the caller's current stream computes.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from loraplex_common.adapter_image import layout
from loraplex_common.low_rank import KIND_A, KIND_B
from loraplex_common.projections import Split
from loraplex_common.vectors import KIND_C, OutVector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.model.linear import Linear

SCRATCH_ITEMS: Final = 2 << 20
"""Numbers of each fp32 scratch, 8 MiB: outputs are taken in slices that fit."""
WEIGHT_ITEMS: Final = 16 << 20
"""Numbers of W that are read at once: some 10 us of the device, which kernels of a step may wait for."""


class PlacedTile(NamedTuple):
    """A tile in the pool; see `TILE_DTYPE`.

    Attributes:
        slice: Slice of the op.
        start: First column or output.
        offset: Bytes into the pool.
    """

    slice: int
    start: int
    rows: int
    cols: int
    offset: int


class OpMagnitudes(NamedTuple):
    """What one op of one layer brings to its magnitudes, which lie in c tiles.

    Attributes:
        a: Tiles of the stacked A.
        b: Tiles of B by slice.
        c: Tiles of magnitudes.
        scalings: Scaling of each slice's pair.
    """

    layer: int
    op: int
    a: list[PlacedTile]
    b: dict[int, list[PlacedTile]]
    c: list[PlacedTile]
    scalings: dict[int, float]


def has_magnitudes(spec: AdapterSpec) -> bool:
    """Tell whether an adapter has c that the engine must compute."""
    return any(isinstance(part, OutVector) and part.is_magnitude for module in spec.modules for part in module.parts)


def num_magnitudes(geometry: Geometry, spec: AdapterSpec) -> int:
    """Return how many numbers an adapter's c has that the engine must compute."""
    count = 0
    for module in spec.modules:
        if any(isinstance(part, OutVector) and part.is_magnitude for part in module.parts):
            op, index = geometry.place(module.layer, module.projection)
            count += geometry.ops[op].local_outputs(geometry.tp_degree)[index]
    return count


def ops_with_magnitudes(geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32]) -> Iterator[OpMagnitudes]:
    """Yield the ops of an adapter that have magnitudes, in the order of the image.

    Args:
        geometry: Geometry of the image.
        spec: The adapter.
        pages: int32 ``[num_pages]``; its pages in the pool.
    """
    slices: dict[tuple[int, int], set[int]] = {}
    scalings: dict[tuple[int, int], dict[int, float]] = {}
    for module in spec.modules:
        op, index = geometry.place(module.layer, module.projection)
        if module.pair is not None:
            scalings.setdefault((module.layer, op), {})[index] = module.scaling
        if any(isinstance(part, OutVector) and part.is_magnitude for part in module.parts):
            slices.setdefault((module.layer, op), set()).add(index)
    tiles = layout(geometry, spec.sizes).tiles
    key = tiles["layer"].astype(np.int64) * len(geometry.ops) + tiles["op"]
    bounds = np.append(np.flatnonzero(np.diff(key, prepend=-1)), len(tiles)).tolist()
    for begin, end in itertools.pairwise(bounds):
        mine = tiles[begin:end]
        at = int(mine["layer"][0]), int(mine["op"][0])
        if at in slices:
            offsets = pages[mine["page"]].astype(np.int64) * geometry.page_bytes + mine["offset"]
            yield _op_magnitudes(at, mine, offsets, slices[at], scalings.get(at, {}))


def _op_magnitudes(
    at: tuple[int, int],
    tiles: NDArray[np.void],
    offsets: NDArray[np.int64],
    slices: set[int],
    scalings: dict[int, float],
) -> OpMagnitudes:
    found = OpMagnitudes(*at, [], {}, [], scalings)
    for (_, _, kind, index, start, rows, cols, _, _), offset in zip(tiles.tolist(), offsets.tolist(), strict=True):
        tile = PlacedTile(index, start, rows, cols, offset)
        if kind == KIND_A:
            found.a.append(tile)
        elif kind == KIND_B:
            found.b.setdefault(index, []).append(tile)
        elif kind == KIND_C and index in slices:
            found.c.append(tile)
    return found


class RowScales:
    """Computes c of an adapter's ops, one op at a time, and writes it into the c tiles of the pool.

    Args:
        pool: uint8 ``[pages, page_bytes]``.
        geometry: Geometry of adapter images.
        linears: Per layer, its fused products by op.
        dtype: Element type of A and B in the pool.
    """

    def __init__(
        self, pool: Tensor, geometry: Geometry, linears: Sequence[Mapping[str, Linear]], dtype: torch.dtype
    ) -> None:
        self._pool, self._geometry, self._linears, self._dtype = pool.view(-1), geometry, linears, dtype
        self._squares: dict[tuple[int, int], Tensor] = {}  # ||W||^2 by layer and op

    def compute(self, op: OpMagnitudes, add_ranks: Callable[[Tensor], None] | None = None) -> Iterator[Tensor | None]:
        """Write the c of an op over its magnitudes, piece by piece.

        Args:
            op: The op.
            add_ranks: Replaces squares of rows, of which each rank has some of the columns, by their sum over ranks; None if
                there is one rank.

        Yields:
            What was written, fp32, after each of `OpMagnitudes.c`; None after pieces of work before.
        """
        linear = self._linears[op.layer][self._geometry.ops[op.op].name]
        yield from self._make_squares(op, linear)
        squares = self._squares[op.layer, op.op]
        a = torch.cat([self._view(tile) for tile in op.a], dim=1) if op.a else None
        for tile in op.c:
            magnitudes = self._numbers(tile)
            begin = self._begin_of(op, tile)
            norm = squares[begin : begin + tile.cols]
            if a is not None and tile.slice in op.b:
                added: list[Tensor] = []
                for piece in self._added_squares(op, linear, a, tile):
                    if added:
                        yield None
                    added.append(piece)
                norm = norm + (torch.cat(added) if len(added) > 1 else added[0])
            if add_ranks is not None and self._has_columns_alone(op):
                norm = norm.clone()  # it may be of the squares that are kept
                add_ranks(norm)
            norm = norm.clamp_min(0).sqrt_()
            c = magnitudes / norm
            c.masked_fill_(norm == 0, 0)  # the row is zero, so its product with x is
            magnitudes.copy_(c)
            yield c

    def restore(self, op: OpMagnitudes, values: Tensor) -> int:
        """Write c of an op that `compute` yielded once; return how many of the values are its."""
        begin = 0
        for tile in op.c:
            self._numbers(tile).copy_(values[begin : begin + tile.cols])
            begin += tile.cols
        return begin

    def _has_columns_alone(self, op: OpMagnitudes) -> bool:
        """Tell whether a rank has all rows of W, and only some of their columns."""
        return self._geometry.ops[op.op].projections[0].split is Split.INPUTS

    def _begin_of(self, op: OpMagnitudes, tile: PlacedTile) -> int:
        """Return the first row of W that a c tile belongs to."""
        outputs = self._geometry.ops[op.op].local_outputs(self._geometry.tp_degree)
        return sum(outputs[: tile.slice]) + tile.start

    def _view(self, tile: PlacedTile) -> Tensor:
        num_bytes = tile.rows * tile.cols * self._dtype.itemsize
        return self._pool[tile.offset : tile.offset + num_bytes].view(self._dtype).view(tile.rows, tile.cols)

    def _numbers(self, tile: PlacedTile) -> Tensor:
        return self._pool[tile.offset : tile.offset + 4 * tile.cols].view(torch.float32)

    def _make_squares(self, op: OpMagnitudes, linear: Linear) -> Iterator[None]:
        """Compute ||W||^2 of each row of an op, once; yield after each piece."""
        key = (op.layer, op.op)
        if key in self._squares:
            return
        step = max(1, WEIGHT_ITEMS // linear.in_features)
        norms = []
        for first in range(0, linear.out_features, step):
            rows = linear.rows(first, min(first + step, linear.out_features))
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
            yield None
        self._squares[key] = torch.cat(norms).square_()

    def _added_squares(self, op: OpMagnitudes, linear: Linear, stacked: Tensor, c_tile: PlacedTile) -> Iterator[Tensor]:
        """Yield ||W + s B A||^2 - ||W||^2 of the rows of a c tile, piece by piece."""
        b_tiles = op.b[c_tile.slice]
        rank = b_tiles[0].cols
        first_rank = sum(tiles[0].cols for other, tiles in op.b.items() if other < c_tile.slice)
        a = stacked[first_rank : first_rank + rank]
        b = torch.cat([self._view(tile) for tile in b_tiles])[c_tile.start : c_tile.start + c_tile.cols]
        scaling, first_row = op.scalings[c_tile.slice], self._begin_of(op, c_tile)
        gram = (a.float() @ a.float().t()).mul_(scaling)
        step = max(1, min(SCRATCH_ITEMS // rank, WEIGHT_ITEMS // linear.in_features))
        for begin in range(0, c_tile.cols, step):
            end = min(begin + step, c_tile.cols)
            wide_b = b[begin:end].float()
            cross = product(linear.rows(first_row + begin, first_row + end), a)
            yield torch.addmm(cross, wide_b, gram, beta=2.0).mul_(wide_b).sum(1).mul_(scaling)


def product(weight: Tensor, a: Tensor) -> Tensor:
    """Return ``weight @ a.T`` in fp32: on a GPU a bf16 product that is not rounded to bf16."""
    if weight.dtype == torch.float32:
        return weight @ a.t()
    if weight.is_cuda:
        return torch.mm(weight, a.t(), out_dtype=torch.float32)
    return weight.float() @ a.float().t()
