"""The model of what ways to compute a pair cost: where A first wins, and how little merging can win."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraplex_bench.pair_ways import PairShape, Way, cost_of, rank_bound, rows_bound, saved_by_merging
from loraplex_bench.rounding import WAYS, AdaptedLinear
from loraplex_bench.shapes import LLAMA2_7B
from loraplex_common.rank_limits import CUDA_MAX_RANK

SIZES = st.integers(8, 30_000)
PROJECTIONS = LLAMA2_7B.geometry.layers[0]


def shapes(rank: int, rows: int) -> list[PairShape]:
    return [PairShape(each.in_features, each.out_features, rank, rows) for each in PROJECTIONS]


@given(columns=SIZES, outputs=SIZES, rank=st.integers(1, 4096), rows=st.integers(1, 10_000))
def test_a_pair_costs_less_than_a_product_with_ba_exactly_below_the_rank_bound(
    columns: int, outputs: int, rank: int, rows: int
) -> None:
    shape = PairShape(columns, outputs, rank, rows)
    apart, beside = cost_of(Way.APART, shape), cost_of(Way.BESIDE, shape)

    is_below = rank < rank_bound(columns, outputs)

    assert (apart.flops < beside.flops) == is_below
    assert (apart.num_bytes < beside.num_bytes) == is_below


@given(columns=SIZES, outputs=SIZES, rank=st.integers(1, 512), rows=st.integers(1, 100_000))
def test_forming_the_sum_takes_fewer_operations_exactly_above_the_rows_bound_and_always_more_bytes(
    columns: int, outputs: int, rank: int, rows: int
) -> None:
    shape = PairShape(columns, outputs, rank, rows)
    apart, formed = cost_of(Way.APART, shape), cost_of(Way.FORMED, shape)

    assert (formed.flops < apart.flops) == (rows > rows_bound(columns, outputs, rank))
    assert formed.num_bytes > apart.num_bytes


def test_every_rank_that_the_kernels_take_is_below_the_bound_of_a_7b_model() -> None:
    bounds = {each.name: rank_bound(each.in_features, each.out_features) for each in PROJECTIONS}

    assert bounds["q_proj"] == 2048
    assert min(bounds.values()) > CUDA_MAX_RANK


@pytest.mark.parametrize("rank", [8, 16, 64, 256, 512])
@pytest.mark.parametrize("rows", [1, 64, 256, 512])
def test_in_a_step_of_a_few_hundred_rows_a_first_takes_the_least_time_that_needs_no_second_weights(
    rank: int, rows: int
) -> None:
    for shape in shapes(rank, rows):
        apart = cost_of(Way.APART, shape).seconds()

        assert apart < cost_of(Way.FORMED, shape).seconds()
        assert apart < cost_of(Way.BESIDE, shape).seconds()


def test_merging_saves_little_of_the_products_even_where_all_rows_have_the_adapter() -> None:
    assert saved_by_merging(shapes(16, 64)) < 0.01
    assert saved_by_merging(shapes(16, 8192)) < 0.01
    assert saved_by_merging(shapes(64, 8192)) < 0.03


def test_all_ways_agree_in_fp32_and_merging_in_bf16_loses_what_the_weights_last_bit_cannot_hold() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(24, 16), torch.randn(2, 16) / 100, torch.randn(24, 2) / 100
    x = torch.randn(5, 16)

    def outputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        layer, found = AdaptedLinear(weight, a, b, 1.0, dtype), {}
        for way in WAYS:
            layer.way = way
            found[way] = layer(x.to(dtype)).float()
        return found

    exact, rounded = outputs(torch.float32), outputs(torch.bfloat16)

    torch.testing.assert_close(exact["apart"], exact["merged"])
    torch.testing.assert_close(exact["base"], exact["unmerged"], atol=1e-5, rtol=1e-5)
    layer = AdaptedLinear(weight, a, b, 1.0)
    assert float((layer.exact - layer.merged).norm()) > float(layer.delta.norm()) / 2, (
        "bf16 takes as much as half of what the pair adds"
    )
    assert not torch.equal(rounded["apart"], rounded["merged"])
