"""Device tables and work items: every tile is addressed, every product is covered exactly once."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import AdapterPool, make_adapters, make_geometry
from loraplex_common.adapter_image import ITEM_BYTES, AdapterSpec, Geometry, ModuleSpec, from_bfloat16, layout
from loraplex_common.low_rank import LOW_RANK, PAIR_DTYPE
from loraplex_kernels.attention.decode import ctas_per_sm, num_splits
from loraplex_kernels.attention.prefill import TILE_ROWS, make_tiles
from loraplex_kernels.lora.items import (
    BLOCK_ROWS,
    GROUP_INTS,
    GROUP_TOKENS,
    GROUP_TOKENS_AT,
    TWO_GROUPS,
    ItemBuilder,
    OpShape,
    header_ints,
    make_groups,
    op_shapes,
    range_index,
)
from loraplex_kernels.lora.prefill import make_segments, plan_op
from loraplex_kernels.lora.prefill_cut import CLUSTERS, RESIDENCIES, WAVE, choose_cut
from loraplex_kernels.lora.prefill_shape import table_size
from loraplex_kernels.lora.ranges import RangeAllocator, TableFullError
from loraplex_kernels.lora.tables import (
    AdapterTables,
    RankLimitError,
    check_parts,
    make_entries,
)
from support.decoder_shapes import OPS

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_matrix(
    pool: AdapterPool, entry: np.void, tiles: NDArray[np.int64], slice_index: int | None
) -> NDArray[np.float32]:
    """Read A (slice_index None) or a slice's B element by element, with the kernels' address arithmetic."""
    geometry, flat = pool.geometry, pool.pages.reshape(-1)
    size = ITEM_BYTES[geometry.dtype]

    def row(offset: int, count: int) -> NDArray[np.float32]:
        raw = flat[offset : offset + count * size]
        return from_bfloat16(raw.view(np.uint16)) if size == 2 else raw.view(np.float32)

    if slice_index is None:
        columns = geometry.projection(0, "q_proj").in_features
        out = np.empty((entry["stacked_rank"], columns), dtype=np.float32)
        for start in range(0, columns, int(entry["a_step"])):
            width = min(int(entry["a_step"]), columns - start)
            base = int(tiles[entry["a_first"] + start // entry["a_step"]])
            for rank_row in range(len(out)):
                out[rank_row, start : start + width] = row(base + rank_row * width * size, width)
        return out
    rank, step, first = (int(entry[key][slice_index]) for key in ("rank", "b_step", "b_first"))
    outputs = geometry.projection(0, OPS["qkv"][slice_index]).shape[1]
    return np.stack([row(int(tiles[first + n // step]) + n % step * rank * size, rank) for n in range(outputs)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (64, 1, 33), (0, 24, 0), (256, 8, 65), (256, 256, 256), (512, 320, 8)])
def test_entries_address_every_element_of_a_and_b(dtype: str, ranks: tuple[int, int, int]) -> None:
    pool = AdapterPool(make_geometry(dtype=dtype, hidden=648, page_bytes=48 * 1024), 128, np.random.default_rng(0))
    adapter = pool.add({(1, name): rank for name, rank in zip(OPS["qkv"], ranks, strict=True) if rank})

    made, tiles = make_entries(pool.geometry, adapter.spec, adapter.pages)
    entries = made[LOW_RANK]

    entry = entries[1, 0]
    assert list(entry["rank"]) == list(ranks)
    stacked = np.concatenate(
        [adapter.tensors[1, name][0] for name, rank in zip(OPS["qkv"], ranks, strict=True) if rank]
    )
    np.testing.assert_array_equal(read_matrix(pool, entry, tiles, None), stacked)
    for index, (name, rank) in enumerate(zip(OPS["qkv"], ranks, strict=True)):
        if rank:
            np.testing.assert_array_equal(read_matrix(pool, entry, tiles, index), adapter.tensors[1, name][1])
            scaling = next(module.scaling for module in adapter.spec.modules if module.projection == name)
            assert entry["scaling"][index] == np.float32(scaling)
    assert not entries[0].view(np.uint8).any(), "a layer without the adapter has a blank entry"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_matrices_that_no_page_divides_need_no_tile_table(dtype: str) -> None:
    pool = AdapterPool(make_geometry(dtype=dtype, hidden=648, page_bytes=48 * 1024), 64, np.random.default_rng(0))
    adapter = pool.add({(1, "q_proj"): 33, (1, "v_proj"): 8, (0, "o_proj"): 24, (0, "down_proj"): 4})

    made, tiles = make_entries(pool.geometry, adapter.spec, adapter.pages)
    entries = made[LOW_RANK]

    size, divided = ITEM_BYTES[dtype], 0
    for entry in entries.reshape(-1):
        matrices = [(entry["a_offset"], entry["a_first"], int(entry["stacked_rank"] * entry["a_step"]))]
        matrices += [
            (entry["b_offset"][i], entry["b_first"][i], int(entry["rank"][i] * entry["b_step"][i])) for i in range(3)
        ]
        for offset, first, elements in matrices:
            last = min([*(m[1] for e in entries.reshape(-1) for m in _matrices(e) if m[1] > first), len(tiles)])
            expected = tiles[first] + np.arange(last - first) * (-(-elements * size // 128) * 128)
            if elements and offset >= 0:
                assert offset == tiles[first]
                np.testing.assert_array_equal(tiles[first:last], expected)
            elif elements:
                divided += 1
                assert (tiles[first:last] != expected).any()
    assert divided, "no matrix crossed a page: the case is too easy"


def _matrices(entry: np.void) -> list[tuple[int, int]]:
    """(elements of a tile, first tile) of an entry's matrices that exist."""
    found = [(int(entry["stacked_rank"]), int(entry["a_first"]))]
    found += [(int(entry["rank"][i]), int(entry["b_first"][i])) for i in range(3)]
    return [matrix for matrix in found if matrix[0]]


def test_binding_again_after_unbinding_reuses_the_tiles() -> None:
    pool = AdapterPool(make_geometry(), 16, np.random.default_rng(1))
    adapter = pool.add_uniform(8)
    count = len(layout(pool.geometry, adapter.spec.sizes).tiles)
    tables = AdapterTables(pool.geometry, max_adapters=2, tile_capacity=count, device=torch.device("cpu"))
    tables.bind(0, adapter.spec, adapter.pages)

    with pytest.raises(RuntimeError, match="bound already"):
        tables.bind(0, adapter.spec, adapter.pages)
    with pytest.raises(TableFullError, match=f"{count} tiles do not fit: 0 of {count}"):
        tables.bind(1, adapter.spec, adapter.pages)
    tables.unbind(0)
    tables.bind(1, adapter.spec, adapter.pages)

    tables.check_integrity()
    assert tables.max_stacked[1, 0] == 24
    assert not tables.max_stacked[0].any()


def test_the_entry_behind_the_last_one_may_be_prefetched() -> None:
    tables = AdapterTables(big_geometry(), max_adapters=2, tile_capacity=0, device=torch.device("cpu"))

    begin = tables.entries.data_ptr() - tables.entries.untyped_storage().data_ptr()
    assert tables.entries.untyped_storage().nbytes() >= begin + tables.entries.nbytes + PAIR_DTYPE.itemsize


def test_too_few_pages_are_refused() -> None:
    geometry = make_geometry()
    spec = AdapterSpec("0" * 64, (ModuleSpec.low_rank(0, "q_proj", 256, 1.0),))

    with pytest.raises(ValueError, match="needs 1 pages, got 0"):
        make_entries(geometry, spec, np.zeros(0, dtype=np.int32))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"q_proj": 8, "k_proj": 513, "v_proj": 8}, r"layer 1: rank 513 \(k_proj\) exceeds the 512"),
        ({"down_proj": 600}, r"layer 1: rank 600 \(down_proj\) exceeds the 512"),
        ({"q_proj": 512, "k_proj": 512, "v_proj": 512, "gate_proj": 256, "up_proj": 200, "o_proj": 256}, ""),
    ],
)
def test_ranks_the_kernels_cannot_take_are_refused_by_name(ranks: dict[str, int], message: str) -> None:
    geometry = make_geometry()
    spec = AdapterSpec("0" * 64, tuple(ModuleSpec.low_rank(1, name, rank, 1.0) for name, rank in ranks.items()))
    pages = np.arange(layout(geometry, spec.sizes).num_pages, dtype=np.int32)
    tables = AdapterTables(geometry, max_adapters=1, tile_capacity=4096, device=torch.device("cpu"))

    if message:
        with pytest.raises(RankLimitError, match=message):
            check_parts(spec)
        with pytest.raises(RankLimitError, match=message):
            tables.bind(0, spec, pages)
        spec = AdapterSpec("1" * 64, (ModuleSpec.low_rank(0, "q_proj", 1, 1.0),))  # a refusal leaves the index free
    else:
        check_parts(spec)
    tables.bind(0, spec, pages)
    tables.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40))
def test_the_range_allocator_never_overlaps_and_loses_nothing(operations: list[tuple[bool, int]]) -> None:
    allocator = RangeAllocator(100)
    held: list[tuple[int, int]] = []
    for is_release, number in operations:
        if is_release and held:
            allocator.release(*held.pop(number % len(held)))
        elif not is_release:
            try:
                held.append((allocator.allocate(number), number))
            except TableFullError:
                continue
        allocator.check_integrity()
        taken = sorted((start, start + size) for start, size in held if size)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))


def rows_of_group(group: NDArray[np.int32]) -> list[int]:
    rows: list[int] = group[GROUP_TOKENS_AT : GROUP_TOKENS_AT + group[1]].tolist()
    return rows


@given(st.lists(st.integers(-1, 4), min_size=0, max_size=60))
def test_groups_hold_every_row_once_and_one_adapter_each(values: list[int]) -> None:
    adapters = np.array(values, dtype=np.int32)

    groups = make_groups(adapters)

    assert sorted(row for group in groups for row in rows_of_group(group)) == list(range(len(values)))
    for group in groups:
        assert 1 <= group[1] <= GROUP_TOKENS
        assert all(adapters[row] == group[0] for row in rows_of_group(group))


def big_geometry() -> Geometry:
    return make_geometry(hidden=4096, inter=11008, heads=32, kv_heads=8, head_dim=128, layers=1)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 70),
    st.sampled_from(["same", "distinct", "uniform", "zipf", "skewed"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_items_cover_every_groups_work_exactly_once(rows: int, pattern: str, has_delta: bool, seed: int) -> None:
    rng, geometry = np.random.default_rng(seed), big_geometry()
    max_ranks = rng.choice([0, 1, 8, 16, 60, 85, 256], (6, 4, 3)).astype(np.int32)
    for op, names in enumerate(OPS.values()):
        max_ranks[:, op, len(names) :] = 0
    stacked = max_ranks.sum(axis=2, dtype=np.int32)
    adapters, shapes = (
        make_adapters(pattern, rows, 6, rng),
        op_shapes(geometry, complete=frozenset({"qkv", "gate_up"} if has_delta else ())),
    )

    built = ItemBuilder(shapes, 2).build(adapters, max_ranks, stacked)

    groups = built.buffer[header_ints(4) : header_ints(4) + GROUP_INTS * built.num_groups].reshape(-1, GROUP_INTS)
    items = built.buffer[header_ints(4) + GROUP_INTS * built.num_groups :].reshape(-1, 4)
    for op, shape in enumerate(shapes):
        first, count = built.buffer[2 * range_index(op, expand=False) :][:2]
        done = [
            (int(item[0]) + second, int(item[2]), int(item[3]) % TWO_GROUPS)
            for item in items[first : first + count]
            for second in range(1 + int(item[3]) // TWO_GROUPS)
        ]
        assert len(done) == len(set(done))
        assert all(groups[item[0], 0] == item[1] for item in items[first : first + count])
        assert set(done) == {
            (group, block, plane)
            for group in range(len(groups))
            if groups[group, 0] >= 0
            for block in range(-(-int(stacked[groups[group, 0], op]) // 16))
            for plane in range(shape.num_planes)
        }
        first, count = built.buffer[2 * range_index(op, expand=True) :][:2]
        covered = np.zeros((len(groups), shape.slice_begin[-1]), dtype=np.int32)
        for group, adapter, begin, extent in items[first : first + count]:
            assert adapter == groups[group, 0]
            assert (begin - max(b for b in shape.slice_begin if b <= begin)) % BLOCK_ROWS == 0
            assert 0 < extent <= shape.max_run
            assert extent % 8 == 0
            covered[group, begin : begin + extent] += 1
        for group in range(len(groups)):
            ranks = max_ranks[groups[group, 0], op] if groups[group, 0] >= 0 else np.zeros(3, dtype=np.int32)
            for index, outputs in enumerate(shape.outputs):
                part = covered[group, shape.slice_begin[index] :][:outputs]
                assert (part == int(shape.complete or ranks[index] > 0)).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 200)), max_size=12), st.integers(0, 5))
def test_segments_cover_the_tokens_of_chunks_with_an_adapter(chunks: list[tuple[int, int]], first: int) -> None:
    adapters, counts = (np.array([c[i] for c in chunks], dtype=np.int32) for i in range(2))
    of_token = np.concatenate([np.full(first, -1), np.repeat(adapters, counts)]).astype(np.int32)

    segments = make_segments(adapters, counts, first)

    seen = np.full(len(of_token), -1, dtype=np.int32)
    for begin, count, adapter in segments:
        assert 1 <= count <= 64
        assert (seen[begin : begin + count] == -1).all()
        seen[begin : begin + count] = adapter
    np.testing.assert_array_equal(seen, of_token)


def test_prefill_items_are_the_adapted_slices_of_each_tile_in_every_share() -> None:
    segments = make_segments(np.array([0, 1], dtype=np.int32), np.array([65, 3], dtype=np.int32), 4)
    ranks = np.array([[16, 0, 8], [0, 0, 24]], dtype=np.int32)[segments[:, 2]]

    plan, items = plan_op(segments, ranks, OpShape(columns=4096, outputs=(4096, 2048, 2048)), (8,))

    expected = [
        (begin, count, adapter, part + 4 * share)
        for begin, count, adapter, parts in ((4, 64, 0, (0, 2)), (68, 1, 0, (0, 2)), (69, 3, 1, (2,)))
        for part in parts
        for share in range(2)
    ]
    assert items.tolist() == [list(item) for item in expected]
    assert (plan.num_items, plan.shares, plan.cluster, plan.ranks) == (10, 2, 8, 32)


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 3), st.sampled_from([64, 576, 4096, 14336]))
def test_prefill_shares_never_leave_the_gpu_more_than_filled_once(tiles: int, slices: int, outputs: int) -> None:
    segments, shape = np.zeros((tiles, 3), dtype=np.int32), OpShape(columns=4096, outputs=(outputs,) * slices)

    plan, items = plan_op(segments, np.full((tiles, slices), 16, dtype=np.int32), shape, CLUSTERS)

    assert len(items) == plan.num_items == tiles * slices * plan.shares
    assert plan.shares == 1 or (plan.num_items * plan.cluster <= WAVE and outputs >= 128 * plan.cluster * plan.shares)


@pytest.mark.parametrize(("items", "cut"), [(8, (8, 2)), (32, (8, 3)), (64, (4, 3)), (96, (2, 2)), (130, (2, 2))])
def test_prefill_prefers_one_wave_of_smaller_clusters_to_two_of_larger_ones(items: int, cut: tuple[int, int]) -> None:
    assert choose_cut(items, OpShape(columns=4096, outputs=(4096,)), CLUSTERS) == cut


@pytest.mark.parametrize("items", [500, 1000, 4000])
def test_prefill_takes_long_rings_for_no_more_waves_than_were_timed(items: int) -> None:
    shape = OpShape(columns=4096, outputs=(4096,))

    assert choose_cut(items, shape, CLUSTERS)[1] == max(RESIDENCIES)
    assert choose_cut(items, shape, CLUSTERS, (2,))[1] == 2  # where there is nothing else


def test_prefill_tables_hold_the_longest_share_of_any_cluster() -> None:
    shapes = op_shapes(big_geometry())

    for cluster in (1, 2, 4, 8):
        size = table_size(shapes, cluster)
        for length in [shape.columns for shape in shapes] + [n for shape in shapes for n in shape.outputs]:
            parts = -(-length // 64)
            assert max(parts * (i + 1) // cluster - parts * i // cluster for i in range(cluster)) <= size


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=6), st.sampled_from([1, 3, 4, 8])
)
def test_attention_tiles_cover_every_row_and_start_with_the_longest(chunks: list[tuple[int, int]], group: int) -> None:
    starts, counts = (np.array([c[i] for c in chunks], dtype=np.int32) for i in range(2))

    tiles = make_tiles(np.arange(len(chunks), dtype=np.int32), starts, counts, 5, group)

    rows = {
        (int(tile[1]), int(tile[4]) + i) for tile in tiles for i in range(TILE_ROWS) if tile[4] + i < tile[3] * group
    }
    begins = 5 + np.cumsum(counts) - counts
    assert rows == {(int(b), r) for b, c in zip(begins, counts, strict=True) for r in range(int(c) * group)}
    keys = tiles[:, 2] + tiles[:, 4] // group
    assert (np.diff(keys) <= 0).all()


def test_splits_fill_the_gpu_once_and_never_starve() -> None:
    ctas = 132 * ctas_per_sm(128)

    assert num_splits(512, ctas, 2048) == 1
    assert num_splits(64, ctas, 2048) == 8
    assert num_splits(64, 132 * ctas_per_sm(256), 2048) == 4
    assert num_splits(8, ctas, 256) == 2
    assert num_splits(1, ctas, 1 << 20) == 64
