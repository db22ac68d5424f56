"""Work items of sparse deltas: which CTA multiplies which outputs of which adapter's S; built once a step.

Every CTA gets about as many bytes of non-zeros, whatever the number of rows: a step's non-zeros, one (group, slice) after the
other, are cut at equal distances, and each piece is the outputs in between. How many non-zeros an output has only the device
knows, so pieces take them to be evenly spread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from loraplex_kernels.lora.items import ITEM_INTS, make_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loraplex_kernels.lora.items import OpShape

MIN_NONZEROS: Final = 1024
"""Least non-zeros of a CTA: below it, what a CTA does besides costs more than a second one saves."""


class SparseWork(NamedTuple):
    """A step's items.

    Attributes:
        ranges: Per op, int32 ``[CTAs + 1]``: the items of CTA i are ``[ranges[i], ranges[i + 1])``.
        groups: int32 ``[groups, 12]``, as `make_groups` makes them.
        items: int32 ``[items, 4]``: group, adapter, first fused output, outputs; one op's behind the other's.
    """

    ranges: list[NDArray[np.int32]]
    groups: NDArray[np.int32]
    items: NDArray[np.int32]


def build_sparse(
    adapters: NDArray[np.int32],
    rows: NDArray[np.int32],
    max_nonzeros: NDArray[np.int32],
    shapes: Sequence[OpShape],
    tokens: Sequence[int],
    grids: Sequence[int],
) -> SparseWork:
    """Return the items of all ops for rows whose adapters have sparse deltas.

    Args:
        adapters: int32 ``[N]``; adapter of each row.
        rows: int32 ``[N]``; the rows' numbers in activations.
        max_nonzeros: `AdapterTables.max_nonzeros`.
        shapes: Shapes of the model's ops.
        tokens: Per op, rows that share a load.
        grids: Per op, CTAs.
    """
    groups = make_groups(adapters, rows)
    ranges: list[NDArray[np.int32]] = []
    parts, first = [np.zeros((0, ITEM_INTS), dtype=np.int32)], 0
    for op, (shape, at_once, grid) in enumerate(zip(shapes, tokens, grids, strict=True)):
        items, bounds = _op_items(groups, max_nonzeros[groups[:, 0], op], shape, at_once, grid)
        ranges.append(bounds + np.int32(first))
        parts.append(items)
        first += len(items)
    return SparseWork(ranges, groups, np.concatenate(parts))


def _op_items(
    groups: NDArray[np.int32], nonzeros: NDArray[np.int32], shape: OpShape, at_once: int, grid: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return one op's items and the bounds of each CTA's; ``nonzeros`` is ``[groups, 3]``."""
    passes = -(-groups[:, 1].astype(np.int64) // at_once)
    work = nonzeros[:, : len(shape.outputs)] * passes[:, None]
    group, part = np.nonzero(work)
    sizes = work[group, part]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    share = max(-(-total // grid), MIN_NONZEROS)
    begins = np.union1d(ends - sizes, np.arange(0, total, share))  # of pieces, in non-zeros
    which = np.searchsorted(ends, begins, side="right")
    outputs = np.array(shape.outputs, dtype=np.int64)[part]
    start = (begins - (ends - sizes)[which]) * outputs[which] // sizes[which]
    is_last = np.append(which[1:] != which[:-1], True)[: len(which)]
    stop = np.where(is_last, outputs[which], np.append(start[1:], 0)[: len(which)])
    items = np.empty((len(begins), ITEM_INTS), dtype=np.int32)
    items[:, 0], items[:, 1] = group[which], groups[group[which], 0]
    items[:, 2] = np.array(shape.slice_begin[:-1], dtype=np.int64)[part[which]] + start
    items[:, 3] = stop - start
    bounds = np.searchsorted(begins, np.arange(grid + 1) * share).astype(np.int32)
    return items, bounds
