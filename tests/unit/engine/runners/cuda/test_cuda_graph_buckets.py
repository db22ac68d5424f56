"""Graph buckets: every batch has one, padding is bounded, and item bounds hold for the worst adapters."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.adapter_image import AdapterSpec, Geometry, ModuleSpec, layout
from loraplex_common.low_rank import LowRank
from loraplex_common.projections import Projection
from loraplex_common.sparse_delta import SparseDelta
from loraplex_common.vectors import Bias, OutVector
from loraplex_engine.pool_geometry import PoolGeometry
from loraplex_engine.runners.cuda.graphs import bucket_sizes, lora_variants, variant_of
from loraplex_engine.runners.cuda.kernel_limits import require_kernels, tile_capacity
from loraplex_engine.runners.cuda.lora_grids import EXPAND_CTAS_PER_SM, SHRINK_CTAS_PER_SM
from loraplex_engine.runners.cuda.token_lora import max_decode_items, max_prefill_items
from loraplex_kernels.compiler import sources
from loraplex_kernels.lora.items import ItemBuilder, op_shapes
from loraplex_kernels.lora.prefill import make_segments, plan_op
from loraplex_kernels.lora.prefill_cut import CLUSTERS
from support.decoder_shapes import OPS, PROJECTIONS, decoder_geometry

GEOMETRY = decoder_geometry(
    dtype="bfloat16",
    page_bytes=2 << 20,
    num_layers=2,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)


def test_buckets_up_to_256_are_the_usual_ones() -> None:
    assert bucket_sizes(256) == (1, 2, 4, 8, 16, 24, 32, *range(48, 257, 16))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 9, 31, 32, 33, 48, 100, 255, 257, 512, 1000, 1025])
def test_the_largest_bucket_holds_every_row_and_no_second_one_does(max_rows: int) -> None:
    sizes = bucket_sizes(max_rows)

    assert sizes[-1] >= max_rows
    assert all(size < max_rows for size in sizes[:-1])
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("ranks", [(1, 1), (64, 192), (85, 255), (16, 48), (256, 256), (256, 768)])
@pytest.mark.parametrize("num_rows", [1, 5, 64, 256])
def test_item_bounds_hold_for_rows_of_distinct_adapters(num_rows: int, ranks: tuple[int, int]) -> None:
    rank, stacked = ranks
    max_ranks = np.full((num_rows, 4, 3), rank, dtype=np.int32)
    max_stacked = np.tile(
        np.array([min(stacked, rank * len(names)) for names in OPS.values()], np.int32), (num_rows, 1)
    )
    adapters = np.arange(num_rows, dtype=np.int32)

    for delta_ops in (frozenset({"qkv", "gate_up"}), frozenset[str]()):
        shapes = op_shapes(GEOMETRY, complete=delta_ops)
        built = ItemBuilder(shapes, 2).build(adapters, max_ranks, max_stacked)
        assert built.counts.sum() <= max_decode_items(shapes, num_rows)
    segments = make_segments(adapters, np.full(num_rows, 70, dtype=np.int32), 0)
    plans = [
        plan_op(segments, max_ranks[segments[:, 2], op, : len(shape.outputs)], shape, CLUSTERS)[0]
        for op, shape in enumerate(shapes)
    ]
    assert sum(plan.num_items for plan in plans) <= max_prefill_items(shapes, num_rows + 70 * num_rows // 64)


@pytest.mark.parametrize("rank", [1, 8, 16, 33, 64, 85, 86, 171, 256])
def test_adapters_that_fill_a_pool_fit_its_tile_table(rank: int) -> None:
    spec = AdapterSpec(
        "0" * 64, tuple(ModuleSpec.low_rank(layer, name, rank, 1.0) for layer in range(2) for name in PROJECTIONS)
    )
    plan = layout(GEOMETRY, spec.sizes)
    num_adapters = 100

    capacity = tile_capacity(GEOMETRY, num_pages=num_adapters * plan.num_pages, max_adapters=num_adapters)

    assert num_adapters * len(plan.tiles) <= capacity
    assert len(OPS) == 4


@pytest.mark.parametrize("num_nonzeros", [100, 20_000, 700_000])
def test_adapters_of_every_part_that_fill_a_pool_fit_its_tile_table(num_nonzeros: int) -> None:
    parts = (LowRank(16, 1.0), OutVector(), Bias(), SparseDelta(num_nonzeros))
    spec = AdapterSpec("0" * 64, tuple(ModuleSpec(layer, name, parts) for layer in range(2) for name in PROJECTIONS))
    plan = layout(GEOMETRY, spec.sizes)

    capacity = tile_capacity(GEOMETRY, num_pages=10 * plan.num_pages, max_adapters=10)

    assert 10 * len(plan.tiles) <= capacity


def test_without_adapters_there_is_no_tile_table() -> None:
    assert tile_capacity(GEOMETRY, num_pages=100, max_adapters=0) == 0


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([[48, 16, 0, 0]], {"qkv", "o"}),
        ([[48, 0, 0, 0], [0, 0, 0, 8]], set(OPS)),
        ([[0, 4, 0, 0]], {"qkv", "o"}),
        ([[0, 0, 32, 16]], set(OPS)),
        ([[0, 0, 0, 0]], set()),
    ],
)
def test_a_batch_gets_the_smallest_variant_with_all_its_ops(ranks: list[list[int]], expected: set[str]) -> None:
    variants = lora_variants(GEOMETRY)

    assert variants[variant_of(variants, GEOMETRY, np.array(ranks, dtype=np.int32))] == expected


def test_variants_are_those_that_the_models_ops_allow() -> None:
    attention, mlp = Projection("self_attn.qkv_proj", "qkv", 64, 96), Projection("mlp.up_proj", "up", 64, 96)

    def variants(*projections: Projection) -> tuple[frozenset[str], ...]:
        return lora_variants(Geometry.of([projections], dtype="bfloat16", page_bytes=4096))

    assert [set(ops) for ops in lora_variants(GEOMETRY)] == [set(), {"qkv", "o"}, set(OPS)]
    assert [set(ops) for ops in variants(attention, mlp)] == [set(), {"qkv"}, {"qkv", "up"}]
    assert [set(ops) for ops in variants(mlp)] == [set(), {"up"}]


@pytest.mark.parametrize(
    ("head_dim", "num_layers", "reason"), [(72, 32, "this model has 72"), (64, 1, "smaller than a tile")]
)
def test_models_our_kernels_cannot_compute_are_refused_with_the_remedy(
    head_dim: int, num_layers: int, reason: str
) -> None:
    pool = PoolGeometry(dtype="bfloat16", num_layers=num_layers, num_kv_heads=1, head_dim=head_dim, block_tokens=16)

    with pytest.raises(ValueError, match=f"{reason}.*--backend torch"):
        require_kernels(pool)


def test_grids_are_what_the_kernels_registers_are_bounded_for() -> None:
    shrink, expand = (sources()[name].read_text() for name in ("lora_shrink", "lora_expand"))

    assert re.findall(r"__launch_bounds__\(kThreads, (\d+)\) lora_shrink", shrink) == [str(SHRINK_CTAS_PER_SM)]
    assert re.findall(r"constexpr int kCtasPerSm = (\d+);", expand) == [str(EXPAND_CTAS_PER_SM)]
