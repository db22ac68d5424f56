"""Work items of decode LoRA for rows that add several adapters up: each adapter of a row is a *term* of it, in order.

The shrink computes h of every term, grouped by adapter as if each term were a row. Rows with the same list of adapters form
a group of the expand, at most 8 of them: an item is a run of outputs of a group, and one CTA adds up its whole list, so that
outputs are read and written once. Lists are padded to the longest of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from loraplex_kernels.lora.items import (
    GROUP_INTS,
    GROUP_TOKENS,
    GROUP_TOKENS_AT,
    ITEM_INTS,
    SMALLEST_RUN,
    ItemRanges,
    OpShape,
    header_ints,
    make_groups,
    shrink_items,
    within_runs,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHAIN_GROUP_INTS: Final = GROUP_INTS + GROUP_TOKENS
CHAIN_ROWS_AT: Final = GROUP_INTS
CHAIN_RUN: Final = SMALLEST_RUN
"""Outputs of an item: a block for each warp, which keeps its sum in registers."""
TERMS_SHIFT: Final = 24  # kTermsShift
MAX_TERMS: Final = 16  # kBatch: a batch of items holds whole lists


class Terms(NamedTuple):
    """The adapters of some rows; a row's lie behind each other, in the order in which they are added.

    Attributes:
        places: int32 ``[V]``, rising; the place of each term's row among the rows.
        adapters: int32 ``[V]``.
        scales: fp32 ``[V]``; the request's factor on the adapter.
        num_rows: Number of rows, those without an adapter too.
    """

    places: NDArray[np.int32]
    adapters: NDArray[np.int32]
    scales: NDArray[np.float32]
    num_rows: int


def make_terms(
    adapters: NDArray[np.int32],
    scales: NDArray[np.float32],
    more_places: NDArray[np.int32],
    more_adapters: NDArray[np.int32],
    more_scales: NDArray[np.float32],
) -> Terms:
    """Return the terms of rows with a first adapter each and more of some.

    Args:
        adapters: int32 ``[N]``; first adapter of each row, -1 for none.
        scales: fp32 ``[N]``; the request's factor on it.
        more_places: int32 ``[E]``; rows of further adapters, in the order in which these are added.
        more_adapters: int32 ``[E]``.
        more_scales: fp32 ``[E]``.
    """
    own = np.flatnonzero(adapters >= 0).astype(np.int32)
    places = np.concatenate([own, more_places])
    order = np.argsort(places, kind="stable")
    return Terms(
        places[order],
        np.concatenate([adapters[own], more_adapters])[order],
        np.concatenate([scales[own], more_scales])[order],
        len(adapters),
    )


def make_lists(terms: Terms) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the list of each row, and its terms' numbers: both int32 ``[N, T]``, padded with -1 and 0.

    Raises:
        ValueError: If a row has more than `MAX_TERMS` terms.
    """
    counts = np.bincount(terms.places, minlength=terms.num_rows)
    longest = max(1, int(counts.max(initial=0)))
    if longest > MAX_TERMS:
        raise ValueError(f"a row has {longest} adapters; the kernels add up {MAX_TERMS}")
    lists = np.full((terms.num_rows, longest), -1, dtype=np.int32)
    numbers = np.zeros((terms.num_rows, longest), dtype=np.int32)
    within = within_runs(counts)
    lists[terms.places, within] = terms.adapters
    numbers[terms.places, within] = np.arange(len(terms.adapters), dtype=np.int32)
    return lists, numbers


def shrink_groups(terms: Terms, rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return ``[groups, 20]``: adapter, count, 2 unused, 8 terms, the 8 rows of activations that they read.

    Args:
        terms: Terms of the rows.
        rows: int32 ``[N]``; the rows' numbers in activations.
    """
    groups = make_groups(terms.adapters)
    found = np.zeros((len(groups), CHAIN_GROUP_INTS), dtype=np.int32)
    found[:, :GROUP_INTS] = groups
    if len(groups):
        found[:, CHAIN_ROWS_AT:] = rows[terms.places[groups[:, GROUP_TOKENS_AT:]]]
    return found


def expand_groups(terms: Terms, rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return ``[groups, T, 20]``: of each entry of a group's list the adapter, count, 2 unused, 8 terms, and the 8 rows.

    Args:
        terms: Terms of the rows.
        rows: int32 ``[N]``; the rows' numbers in activations.
    """
    lists, numbers = make_lists(terms)
    which = np.unique(lists, axis=0, return_inverse=True)[1].reshape(-1)
    groups = make_groups(which.astype(np.int32))
    places, counts = groups[:, GROUP_TOKENS_AT:], groups[:, 1]
    is_live = np.arange(GROUP_TOKENS) < counts[:, None]
    found = np.zeros((len(groups), lists.shape[1], CHAIN_GROUP_INTS), dtype=np.int32)
    if len(groups):
        found[:, :, 0], found[:, :, 1] = lists[places[:, 0]], counts[:, None]
        of_entry = numbers[places].transpose(0, 2, 1)
        found[:, :, GROUP_TOKENS_AT:CHAIN_ROWS_AT] = np.where(is_live[:, None], of_entry, 0)
        found[:, :, CHAIN_ROWS_AT:] = np.where(is_live, rows[places], 0)[:, None]
    return found


def chain_items(groups: NDArray[np.int32], ranks: NDArray[np.int32], shape: OpShape, first: int) -> NDArray[np.int32]:
    """Return ``[items, 4]``: number of the group's first record, its adapter, first fused output, outputs.

    Args:
        groups: From `expand_groups`.
        ranks: int32 ``[groups, T, 3]``; ranks of each entry's adapter, 0 without one.
        shape: Shape of the op.
        first: Number of the first record of all.
    """
    parts = [np.zeros((0, ITEM_INTS), dtype=np.int32)]
    for index, (begin, outputs) in enumerate(zip(shape.slice_begin, shape.outputs, strict=False)):
        is_live = shape.complete | (ranks[:, :, index] > 0).any(axis=1)
        counts = np.where(is_live, -(-outputs // CHAIN_RUN), 0).astype(np.int64)
        group, start = np.repeat(np.arange(len(groups)), counts), within_runs(counts) * CHAIN_RUN
        part = np.empty((len(group), ITEM_INTS), dtype=np.int32)
        part[:, 0], part[:, 1] = first + group * groups.shape[1], groups[group, 0, 0]
        part[:, 2], part[:, 3] = begin + start, np.minimum(CHAIN_RUN, outputs - start)
        parts.append(part)
    return np.concatenate(parts)


def build_chains(
    shapes: tuple[OpShape, ...],
    terms: Terms,
    rows: NDArray[np.int32],
    max_ranks: NDArray[np.int32],
    max_stacked: NDArray[np.int32],
) -> ItemRanges:
    """Return the items of all ops; a range of the expand says how long lists are, above bit `TERMS_SHIFT` of its number.

    Args:
        shapes: Shapes of the model's ops.
        terms: Terms of the rows.
        rows: int32 ``[N]``; the rows' numbers in activations.
        max_ranks: `AdapterTables.max_ranks`.
        max_stacked: `AdapterTables.max_stacked`.
    """
    shrinking, expanding = shrink_groups(terms, rows), expand_groups(terms, rows)
    adapters, length = expanding[:, :, 0], expanding.shape[1]
    num_ops = len(shapes)
    header, counts = np.zeros(header_ints(num_ops), dtype=np.int32), np.zeros(2 * num_ops, dtype=np.int32)
    parts: list[NDArray[np.int32]] = []
    first = 0
    for op, shape in enumerate(shapes):
        ranks = np.where(adapters[:, :, None] >= 0, max_ranks[np.maximum(adapters, 0), op], 0)
        for items, terms_each in (
            (shrink_items(shrinking, max_stacked[shrinking[:, 0], op], shape), 0),
            (chain_items(expanding, ranks, shape, len(shrinking)), length),
        ):
            index = len(parts)
            header[2 * index : 2 * index + 2] = first, len(items) | terms_each << TERMS_SHIFT
            counts[index] = len(items)
            first += len(items)
            parts.append(items.reshape(-1))
    records = len(shrinking) + len(expanding) * length
    return ItemRanges(np.concatenate([header, shrinking.reshape(-1), expanding.reshape(-1), *parts]), records, counts)
