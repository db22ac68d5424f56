"""Work items of rows with several adapters: every output of every row is written once, after all terms of its list."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels.lora.chain_items import (
    CHAIN_GROUP_INTS,
    CHAIN_ROWS_AT,
    CHAIN_RUN,
    MAX_TERMS,
    TERMS_SHIFT,
    build_chains,
    make_lists,
    make_terms,
)
from loraplex_kernels.lora.chains import max_chain_items
from loraplex_kernels.lora.items import GROUP_TOKENS_AT, OpShape, header_ints

SHAPES: Final = (
    OpShape(columns=2048, outputs=(576, 64, 64), complete=True),
    OpShape(columns=576, outputs=(520,)),
)
MAX_RANKS: Final = np.array([[[16, 0, 8], [4, 0, 0]], [[0, 0, 0], [16, 0, 0]], [[8, 8, 8], [0, 0, 0]]], dtype=np.int32)
LISTS: Final = st.lists(
    st.permutations(range(3)).flatmap(lambda p: st.integers(0, 3).map(lambda n: p[:n])), max_size=30
)


@given(lists=LISTS, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_items_cover_every_output_of_every_row_once_with_the_whole_list(lists: list[list[int]], seed: int) -> None:
    rows = np.random.default_rng(seed).permutation(64)[: len(lists)].astype(np.int32)
    first = np.array([each[0] if each else -1 for each in lists], dtype=np.int32)
    more = [(row, adapter) for row, each in enumerate(lists) for adapter in each[1:]]
    places, adapters = (np.array([entry[i] for entry in more], dtype=np.int32) for i in range(2))
    terms = make_terms(first, first.astype(np.float32), places, adapters, adapters.astype(np.float32))
    assert [terms.adapters[terms.places == row].tolist() for row in range(len(lists))] == lists
    assert np.array_equal(terms.scales, terms.adapters)

    built = build_chains(SHAPES, terms, rows, MAX_RANKS, MAX_RANKS.sum(-1))

    head = header_ints(len(SHAPES))
    at = head + built.num_groups * CHAIN_GROUP_INTS
    records = built.buffer[head:at].reshape(-1, CHAIN_GROUP_INTS)
    items = built.buffer[at:].reshape(-1, 4)
    assert len(items) <= max_chain_items(SHAPES, max_terms=max(len(terms.adapters), 1), max_rows=max(len(lists), 1))
    for op, shape in enumerate(SHAPES):
        begin, count = built.buffer[4 * op : 4 * op + 2]
        for group, adapter, block, plane in items[begin : begin + count].tolist():
            record = records[group]
            assert record[0] == adapter
            of_group = record[GROUP_TOKENS_AT : GROUP_TOKENS_AT + record[1]]
            assert (terms.adapters[of_group] == adapter).all()
            assert (rows[terms.places[of_group]] == record[CHAIN_ROWS_AT:][: record[1]]).all()
            assert 16 * block < MAX_RANKS[adapter, op].sum()
            assert plane % (1 << 16) < shape.num_planes
        begin, both = built.buffer[4 * op + 2 : 4 * op + 4]
        count, length = both & ((1 << TERMS_SHIFT) - 1), both >> TERMS_SHIFT
        assert count == built.counts[2 * op + 1]
        assert length == max([1, *map(len, lists)])
        written = np.zeros((64, shape.slice_begin[-1]), dtype=int)
        for group, _, output, extent in items[begin : begin + count].tolist():
            entries = records[group : group + length]
            found = entries[0, CHAIN_ROWS_AT:][: entries[0, 1]]
            assert extent <= CHAIN_RUN
            written[found, output : output + extent] += 1
            for place, row in enumerate(found.tolist()):
                expected = lists[rows.tolist().index(row)]
                assert entries[:, 0].tolist() == [*expected, *[-1] * (length - len(expected))]
                for entry, adapter in zip(entries, expected, strict=False):
                    term = entry[GROUP_TOKENS_AT + place]
                    assert (terms.adapters[term], rows[terms.places[term]]) == (adapter, row)
        for row, each in zip(rows.tolist(), lists, strict=True):
            slices = zip(shape.slice_begin, shape.slice_begin[1:], strict=False)
            for index, (start, stop) in enumerate(slices):
                is_adapted = shape.complete or any(MAX_RANKS[adapter, op, index] for adapter in each)
                assert (written[row, start:stop] == is_adapted).all()


def test_a_list_longer_than_a_batch_of_the_kernel_is_refused_with_both_numbers() -> None:
    one, many = np.zeros(1, dtype=np.int32), np.arange(1, MAX_TERMS + 1, dtype=np.int32)
    terms = make_terms(one, one.astype(np.float32), np.zeros_like(many), many, many.astype(np.float32))

    with pytest.raises(ValueError, match=f"{MAX_TERMS + 1} adapters; the kernels add up {MAX_TERMS}"):
        make_lists(terms)
