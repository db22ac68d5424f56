"""Paged attention equals plain attention over each sequence, whatever pages, lengths, chunks and windows are mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_engine.pool_geometry import PoolGeometry
from loraplex_engine.runners.torch.attention import DecodeGroup, PagedPool
from loraplex_engine.runners.torch.attention_plan import AttentionStep, _cut_into_groups
from loraplex_engine.step import StepPlan
from support.plans import Draw, sampling_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 8, 2
NUM_PAGES = 256


def make_pool(block_tokens: int = 4, kv_dtype: str = "") -> PagedPool:
    geometry = PoolGeometry(
        dtype="float32",
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        block_tokens=block_tokens,
        kv_dtype=kv_dtype,
    )
    pages = torch.full((NUM_PAGES, geometry.page_bytes), 0xFF, dtype=torch.uint8)  # NaN until written
    return PagedPool(pages, geometry, HEADS, torch.float32, scale=geometry.head_dim**-0.5)


def make_plan(starts: list[int], lengths: list[int], num_decode_rows: int, block_tokens: int, seed: int) -> StepPlan:
    free = np.random.default_rng(seed).permutation(NUM_PAGES).tolist()
    blocks = [-(-(start + length) // block_tokens) for start, length in zip(starts, lengths, strict=True)]
    tables = np.full((len(starts), max(blocks)), -1, dtype=np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = [free.pop() for _ in range(count)]
    rows = np.arange(len(starts), dtype=np.int32)
    return StepPlan(
        step_id=1,
        slots=rows,
        num_tokens=np.array(lengths, dtype=np.int32),
        starts=np.array(starts, dtype=np.int32),
        token_ids=np.zeros(sum(lengths), dtype=np.int32),
        block_tables=tables,
        adapters=np.full(len(starts), -1, dtype=np.int32),
        adapter_scales=np.ones(len(starts), dtype=np.float32),
        num_decode_rows=num_decode_rows,
        sample_rows=rows,
        sampling=sampling_arrays([Draw()] * len(starts), [0] * len(starts)),
    )


def write_history(pool: PagedPool, plan: StepPlan, histories: list[torch.Tensor], layer: int) -> None:
    """Write the keys and values of the tokens before the step, ``[start, 2 * kv_heads, dim]`` per row; FP8 rounds them."""
    size = pool.geometry.block_tokens
    for row, history in enumerate(histories):
        positions = np.arange(int(plan.starts[row]))
        pages = plan.block_tables[row].astype(np.int64)
        if len(positions) % size:  # the runner cleared the page when it was begun
            pool.pages[int(pages[len(positions) // size])] = 0
        if len(positions):
            pool.write(layer, pool.token_index(pages[positions // size], positions % size), history)


def plain_attention(queries: torch.Tensor, keys_values: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
    """Attention by its definition in fp64: queries ``[chunk, heads, dim]`` at ``start``, all keys and values so far."""
    keys, values = (
        part.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for part in torch.split(keys_values, KV_HEADS, 1)
    )
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) / DIM**0.5
    distance = (start + torch.arange(len(queries)))[:, None] - torch.arange(len(keys))
    visible = (distance >= 0) & (distance < (window or len(keys) + 1))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def run(
    plan: StepPlan, order: NDArray[np.int64], window: int | None, block_tokens: int, kv_dtype: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the pool attends, and the truth over the keys and values that it keeps, rows in the order of the plan."""
    generator = torch.Generator().manual_seed(0)
    pool, layer = make_pool(block_tokens, kv_dtype), LAYERS - 1
    histories = [torch.randn((int(n), 2 * KV_HEADS, DIM), generator=generator) for n in plan.starts]
    heads = [torch.randn((int(n), HEADS + 2 * KV_HEADS, DIM), generator=generator) for n in plan.num_tokens]
    write_history(pool, plan, histories, layer)
    step = AttentionStep(pool, plan, order, {window})
    step.clear_new_pages()
    mixed = torch.cat([heads[row] for row in order])
    out = torch.empty((len(mixed), HEADS * DIM))

    pool.write(layer, step.write_index, mixed[:, HEADS:])
    pool.attend(layer, step.windows[window], mixed, out)

    kept = torch.split(mixed, [len(heads[row]) for row in order])
    truth = [
        plain_attention(
            heads[row][:, :HEADS], torch.cat((histories[row], new[:, HEADS:])), int(plan.starts[row]), window
        )
        for row, new in zip(order, kept, strict=True)
    ]
    return out, torch.cat(truth)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    decode=st.lists(st.integers(0, 40), max_size=6),
    prefill=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=3),
    window=st.sampled_from([None, 1, 5, 16]),
    block_tokens=st.sampled_from([1, 4, 16]),
    kv_dtype=st.sampled_from(["", "fp8"]),
    seed=st.integers(0, 1000),
)
def test_any_mix_of_rows_equals_plain_attention(
    decode: list[int],
    prefill: list[tuple[int, int]],
    window: int | None,
    block_tokens: int,
    kv_dtype: str,
    seed: int,
) -> None:
    if not decode and not prefill:
        return
    starts = [*decode, *(start for start, _ in prefill)]
    lengths = [1] * len(decode) + [length for _, length in prefill]
    plan = make_plan(starts, lengths, len(decode), block_tokens, seed)
    order = np.random.default_rng(seed).permutation(len(starts))

    found, truth = run(plan, order, window, block_tokens, kv_dtype)

    assert (found.double() - truth).abs().max() < 1e-5


@given(blocks=st.lists(st.integers(1, 200), min_size=1, max_size=40), limit=st.integers(1, 500))
def test_groups_hold_every_row_once_within_bounds(blocks: list[int], limit: int) -> None:
    counts = np.array(blocks)

    groups = _cut_into_groups(counts, limit)

    assert sorted(np.concatenate(groups).tolist()) == list(range(len(blocks)))
    for group in groups:
        padded = int(counts[group].max()) * len(group)
        assert len(group) == 1 or padded <= limit
        assert padded - counts[group].sum() <= 0.25 * padded


def test_rows_of_about_the_same_length_are_one_group_that_needs_no_index() -> None:
    pool = make_pool()
    plan = make_plan([13, 14, 15, 12], [1] * 4, 4, 4, 0)

    groups = AttentionStep(pool, plan, np.arange(4), {None}).windows[None].decode

    assert [type(group) for group in groups] == [DecodeGroup]
    assert groups[0].tokens == slice(0, 4)


@pytest.mark.parametrize("window", [None, 6])
def test_a_window_gathers_only_the_blocks_it_reaches(window: int | None) -> None:
    plan = make_plan([100], [1], 1, 4, 0)

    (group,) = AttentionStep(make_pool(), plan, np.arange(1), {window}).windows[window].decode

    assert group.mask.shape[-1] == (104 if window is None else 12)
