"""Ranks divide a factor that each has whole where reading all of it takes longer than a collective."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.projections import Split
from loraplex_engine.rank_split import PairLoad, PairSplit, RankRates, share

RATES = RankRates(link_bytes_per_s=450e9, latency_s=10e-6, read_bytes_per_s=3e12, flops_per_s=700e12)


def qkv_of_7b(*, adapters: int, rank: int, degree: int = 4, tokens_each: int = 1) -> PairLoad:
    """Return the load of q, k and v of Llama-2-7B in bf16; each adapter has so many tokens."""
    numbers = adapters * 3 * rank * 4096
    return PairLoad(
        split=Split.OUTPUTS,
        degree=degree,
        factor_bytes=2 * numbers,
        products=tokens_each * numbers,
        h_size=adapters * tokens_each * 3 * rank,
    )


@pytest.mark.parametrize(
    ("adapters", "rank", "split"),
    [
        (1, 8, PairSplit.WHOLE),  # 0.07 us of reading
        (1, 256, PairSplit.WHOLE),
        (64, 8, PairSplit.WHOLE),
        (64, 64, PairSplit.DIVIDED),  # 33 us of reading
        (256, 16, PairSplit.DIVIDED),
    ],
)
def test_few_bytes_are_read_whole_and_many_divided(adapters: int, rank: int, split: PairSplit) -> None:
    assert qkv_of_7b(adapters=adapters, rank=rank).faster(RATES) is split


def test_a_slower_link_keeps_factors_whole() -> None:
    load = qkv_of_7b(adapters=64, rank=64)

    assert load.faster(replace(RATES, latency_s=30e-6)) is PairSplit.WHOLE
    assert load.faster(replace(RATES, link_bytes_per_s=1e9)) is PairSplit.WHOLE


def test_a_prompt_of_one_adapter_counts_by_its_arithmetic() -> None:
    prompt = qkv_of_7b(adapters=1, rank=64, tokens_each=8192)

    assert prompt.whole_s(RATES) == pytest.approx(2 * prompt.products / RATES.flops_per_s)
    assert prompt.whole_s(RATES) > prompt.factor_bytes / RATES.read_bytes_per_s


def test_a_sum_moves_twice_what_a_gathering_moves() -> None:
    free = replace(RATES, latency_s=0.0, read_bytes_per_s=1e30, flops_per_s=1e30)
    gathered = qkv_of_7b(adapters=8, rank=64)

    summed = replace(gathered, split=Split.INPUTS)

    assert summed.divided_s(free) == pytest.approx(2 * gathered.divided_s(free))
    assert gathered.divided_s(free) == pytest.approx(3 / 4 * gathered.h_size * 4 / free.link_bytes_per_s)


@given(st.integers(0, 2000), st.integers(2, 9))
def test_shares_are_all_of_it_in_order_and_none_is_larger_than_the_first(size: int, degree: int) -> None:
    shares = [share(size, rank, degree) for rank in range(degree)]

    assert [number for first, last in shares for number in range(first, last)] == list(range(size))
    assert max(last - first for first, last in shares) == shares[0][1]
