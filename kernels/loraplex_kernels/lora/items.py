"""Work items of a decode step: which CTA computes which share of which adapter's LoRA; built once, used by all layers.

Rows are grouped by adapter, at most 8 to a group. A group's work is cut into items of about equal bytes, so that cost
follows the sum of the ranks in the batch and not their maximum. Ranks may differ between layers: items cover the
largest rank, and a kernel skips what its layer does not have.

Everything a step needs is one int32 buffer: ranges ``[2 * ops, 2]`` (padded), groups, items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from loraplex_common.low_rank import MAX_SLICES

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from numpy.typing import NDArray

GROUP_TOKENS: Final = 8  # kGroupTokens
SHRINK_ROWS: Final = 16  # kRows
SHRINK_CHUNK: Final = 1024
SHRINK_WAVE_ITEMS: Final = 396  # three CTAs for each multiprocessor of an H100
TWO_GROUPS: Final = 1 << 16  # kTwoGroups
MAX_PLANES: Final = 6
"""Planes of h per op: each costs the kernel that reads h a round of loads; fewer make the shrink's items longer."""
GROUP_TOKENS_AT: Final = 4
GROUP_INTS: Final = GROUP_TOKENS_AT + GROUP_TOKENS
ITEM_INTS: Final = 4
HEADER_STEP: Final = 32  # a whole line of the cache: groups and items begin on 128 bytes
EXPAND_ITEM_BYTES: Final = 16 * 1024
WAVE_ITEMS: Final = 660  # five CTAs for each multiprocessor of an H100: with fewer items, runs are cut shorter
BLOCK_ROWS: Final = 64  # kBlockRows
SMALLEST_RUN: Final = 4 * BLOCK_ROWS  # a block for each warp


@dataclass(frozen=True, kw_only=True, slots=True)
class OpShape:
    """The facts of one op that the item builder needs.

    Attributes:
        columns: Input features.
        outputs: Output features of each slice.
        max_run: Longest run the kernel takes.
        complete: Every output of every row has an item, adapted or not: the kernel that reads the delta reads all of
            it.
        row_columns: Columns of a row of the output; more than there are outputs only in logits.
        slice_begin: First fused output of each slice, and the end.
        kernel_slice_begin: The same as kernels take it; slices that the op lacks are empty.
    """

    columns: int
    outputs: tuple[int, ...]
    max_run: int = 512
    complete: bool = False
    row_columns: int = 0
    slice_begin: tuple[int, ...] = field(init=False)
    kernel_slice_begin: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        begin = tuple(accumulate(self.outputs, initial=0))  # kept, as every launch reads it
        object.__setattr__(self, "slice_begin", begin)
        object.__setattr__(self, "row_columns", self.row_columns or begin[-1])
        object.__setattr__(self, "kernel_slice_begin", begin + begin[-1:] * (MAX_SLICES + 1 - len(begin)))

    @property
    def plane_columns(self) -> int:
        """Columns of a plane of h."""
        return SHRINK_CHUNK * -(-self.columns // (SHRINK_CHUNK * MAX_PLANES))

    @property
    def num_planes(self) -> int:
        """Planes of h that the shrink writes."""
        return -(-self.columns // self.plane_columns)


def op_shapes(geometry: Geometry, *, complete: frozenset[str] = frozenset()) -> tuple[OpShape, ...]:
    """Return the shapes of a model's ops, of one tensor-parallel rank, in the order of ``geometry.decoder_ops``.

    Args:
        geometry: Shapes of the base model.
        complete: Ops whose expand writes a whole delta; the others' add to their op's output where it is adapted.
    """
    return tuple(
        OpShape(
            columns=op.local_columns(geometry.tp_degree),
            outputs=op.local_outputs(geometry.tp_degree),
            complete=op.name in complete,
        )
        for op in geometry.decoder_ops
    )


class ItemRanges(NamedTuple):
    """The places of a step's items.

    Ints of the buffer, with H the header's length and G groups:

        [0, H)              (first item, items) of each range, padded
        [H, H + 12 * G)     groups
        [H + 12 * G, end)   items of 4 ints: op by op, the shrink's before the expand's

    Attributes:
        buffer: int32; header ``[(first item, items)]`` by `range_index`, then groups, then items.
        num_groups: Groups in it.
        counts: ``[2 * ops]`` items by `range_index`.
    """

    buffer: NDArray[np.int32]
    num_groups: int
    counts: NDArray[np.int32]


def range_index(op_index: int, *, expand: bool) -> int:
    """Return the place of an op's shrink or expand items in the header."""
    return 2 * op_index + expand


def header_ints(num_ops: int) -> int:
    """Return the length of the header of a model with that many ops: two ranges of two ints each, padded."""
    return -(-4 * num_ops // HEADER_STEP) * HEADER_STEP


def make_groups(adapters: NDArray[np.int32], rows: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """Group rows by adapter, at most `GROUP_TOKENS` each, in order of adapter.

    Args:
        adapters: int32 ``[N]``; adapter of each row, -1 for none.
        rows: int32 ``[N]``; the rows' numbers in activations, 0..N-1 if unset.

    Returns:
        int32 ``[groups, 12]``: adapter, count, 2 unused, 8 tokens.
    """
    count = len(adapters)
    order = np.argsort(adapters, kind="stable").astype(np.int32)
    sorted_adapters = adapters[order]
    is_start = np.ones(count, dtype=bool)
    is_start[1:] = sorted_adapters[1:] != sorted_adapters[:-1]
    starts = np.flatnonzero(is_start)
    in_run = np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))
    group_of = np.cumsum(in_run % GROUP_TOKENS == 0) - 1
    groups = np.zeros((int(group_of[-1]) + 1 if count else 0, GROUP_INTS), dtype=np.int32)
    groups[group_of, 0] = sorted_adapters
    np.add.at(groups[:, 1], group_of, 1)
    groups[group_of, GROUP_TOKENS_AT + in_run % GROUP_TOKENS] = order if rows is None else rows[order]
    return groups


def within_runs(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``[0, counts[0])``, ``[0, counts[1])``, ... one after another."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def shrink_items(groups: NDArray[np.int32], stacked: NDArray[np.int32], shape: OpShape) -> NDArray[np.int32]:
    """Return ``[items, 4]``: group, adapter, block of 16 rank rows, plane.

    A group has one item per block b and plane p. With C = ``shape.plane_columns``, the item covers:

        [16 * b, 16 * (b + 1))    rows of the stacked A
        [C * p, C * (p + 1))      its columns, and the columns of x

    If there are more items than run at a time, two groups of one adapter share an item, so that its weights are read
    half as often: `TWO_GROUPS` is added to the plane, and the next group has no items of its own.

    Args:
        groups: Groups from `make_groups`.
        stacked: int32 ``[groups]``; stacked rank of each group's adapter, 0 without one.
        shape: Shape of the op.
    """
    blocks = -(-stacked.astype(np.int64) // SHRINK_ROWS)
    is_shared = np.zeros(len(groups), dtype=bool)  # whether a group shares items with the next group
    if int(blocks.sum()) * shape.num_planes > SHRINK_WAVE_ITEMS:
        adapters = groups[:, 0]
        starts = np.flatnonzero(np.diff(adapters, prepend=-2))
        is_even = within_runs(np.diff(np.append(starts, len(groups)))) % 2 == 0
        is_shared[:-1] = is_even[:-1] & (adapters[1:] == adapters[:-1])
        blocks[1:][is_shared[:-1]] = 0
    counts = blocks * shape.num_planes
    group = np.repeat(np.arange(len(groups)), counts)
    within = within_runs(counts)
    items = np.empty((len(group), ITEM_INTS), dtype=np.int32)
    items[:, 0], items[:, 1] = group, groups[group, 0]
    items[:, 2] = within // shape.num_planes
    items[:, 3] = within % shape.num_planes + TWO_GROUPS * is_shared[group]
    return items


def expand_items(
    groups: NDArray[np.int32], ranks: NDArray[np.int32], shape: OpShape, item_bytes: int
) -> NDArray[np.int32]:
    """Return ``[items, 4]``: group, adapter, first fused output, outputs.

    The outputs of a slice that begins at fused output b and has n of them are cut into runs of r, by rank:

        [b + i * r, b + min((i + 1) * r, n))    outputs of item i

    Args:
        groups: Groups from `make_groups`.
        ranks: int32 ``[groups, 3]``; ranks of each group's adapter, 0 without one.
        shape: Shape of the op.
        item_bytes: Bytes of an element.
    """
    slices = [
        (begin, outputs, ranks[:, index])
        for index, (begin, outputs) in enumerate(zip(shape.slice_begin, shape.outputs, strict=False))
    ]
    total = sum(outputs for _, outputs, _ in slices)
    spread = max(BLOCK_ROWS, 2 ** math.ceil(math.log2(max(total * len(groups) / WAVE_ITEMS, 1))))
    parts = []
    for begin, outputs, rank in slices:
        longest = np.minimum(EXPAND_ITEM_BYTES // np.maximum(rank * item_bytes, 1), spread)
        longest = np.maximum(longest, SMALLEST_RUN)
        run = 2 ** np.floor(np.log2(np.minimum(longest, shape.max_run))).astype(np.int64)
        counts = -(-outputs // run) * (rank > 0 if not shape.complete else 1)
        group = np.repeat(np.arange(len(groups)), counts)
        start = within_runs(counts) * run[group]
        part = np.empty((len(group), ITEM_INTS), dtype=np.int32)
        part[:, 0], part[:, 1] = group, groups[group, 0]
        part[:, 2], part[:, 3] = begin + start, np.minimum(run[group], outputs - start)
        parts.append(part)
    return np.concatenate(parts)


class ItemBuilder:
    """Builds the items of a step.

    Args:
        shapes: Shapes of the model's ops, from `op_shapes`.
        item_bytes: Bytes of an element.
    """

    def __init__(self, shapes: tuple[OpShape, ...], item_bytes: int) -> None:
        self.shapes = shapes
        self._item_bytes = item_bytes

    def build(
        self,
        adapters: NDArray[np.int32],
        max_ranks: NDArray[np.int32],
        max_stacked: NDArray[np.int32],
        rows: NDArray[np.int32] | None = None,
    ) -> ItemRanges:
        """Return the items of all ops for rows with these adapters.

        Args:
            adapters: int32 ``[N]``; -1 for the base model alone.
            max_ranks: `AdapterTables.max_ranks`.
            max_stacked: `AdapterTables.max_stacked`.
            rows: int32 ``[N]``; the rows' numbers in activations, 0..N-1 if unset.
        """
        groups = make_groups(adapters, rows)
        has_adapter = groups[:, 0] >= 0
        of_group = np.maximum(groups[:, 0], 0)
        num_ops = len(self.shapes)
        header, counts = np.zeros(header_ints(num_ops), dtype=np.int32), np.zeros(2 * num_ops, dtype=np.int32)
        parts: list[NDArray[np.int32]] = []
        first = 0
        for op, shape in enumerate(self.shapes):
            stacked = np.where(has_adapter, max_stacked[of_group, op], 0)
            ranks = np.where(has_adapter[:, None], max_ranks[of_group, op], 0)
            for items in (shrink_items(groups, stacked, shape), expand_items(groups, ranks, shape, self._item_bytes)):
                index = len(parts)
                header[2 * index : 2 * index + 2] = first, len(items)
                counts[index] = len(items)
                first += len(items)
                parts.append(items.reshape(-1))
        return ItemRanges(np.concatenate([header, groups.reshape(-1), *parts]), len(groups), counts)
