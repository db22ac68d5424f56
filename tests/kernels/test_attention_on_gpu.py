"""Attention on the GPU against its fp32 reference: decode, prefill, scalar; windows, splits, what is not a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.gpu_tensors import ATTENTION_TOLERANCE, DTYPES, ints, libraries, library, poisoned, randn
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.prefill import AttentionPrefill, make_tiles
from loraplex_kernels.attention.scalar import AttentionScalar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def paged_sequences(contexts: list[int], layout: KvLayout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of two layers of random K and V, and block tables in random order."""
    blocks = [-(-max(c, 1) // layout.block_tokens) for c in contexts]
    order, width = torch.randperm(sum(blocks) + 3, device="cuda").int(), max(blocks)
    pool = randn((sum(blocks) + 3) * layout.page_bytes // dtype.itemsize, dtype=dtype).view(torch.uint8)
    tables, begin = torch.full((len(contexts), width), -1, dtype=torch.int32, device="cuda"), 0
    for row, count in enumerate(blocks):
        tables[row, :count] = order[begin : begin + count]
        begin += count
    return pool.view(-1, layout.page_bytes), tables


def make_layout(heads: int, kv_heads: int, head_dim: int, block: int, dtype: torch.dtype, window: int = 0) -> KvLayout:
    return KvLayout(
        page_bytes=2 * 2 * kv_heads * block * head_dim * dtype.itemsize,
        block_tokens=block,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
    )


ATTENTION_SHAPES = [
    (9, 3, 64, 16),
    (32, 8, 128, 16),
    (8, 8, 128, 4),
    (8, 8, 64, 16),
    (12, 1, 64, 16),
    (16, 2, 128, 16),
    (6, 2, 80, 16),
    (32, 32, 96, 8),
    (8, 4, 256, 16),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), ATTENTION_SHAPES)
@pytest.mark.parametrize(("window", "splits"), [(0, None), (0, 1), (0, 7), (100, None), (33, 5)])
def test_attention_decode(
    heads: int, kv_heads: int, head_dim: int, block: int, window: int, splits: int | None
) -> None:
    dtype = torch.bfloat16
    layout, contexts = make_layout(heads, kv_heads, head_dim, block, dtype, window), [1, 16, 17, 64, 500, 1999, 0, 131]
    for lib in libraries(dtype):
        pool, tables = paged_sequences(contexts, layout, dtype)
        qkv, out = (
            randn(len(contexts), layout.qkv_width, dtype=dtype),
            poisoned(len(contexts), heads * head_dim, dtype=dtype),
        )
        kernel = AttentionDecode(lib, layout, max_rows=64, max_context=2048)
        for _ in range(2):  # the second launch meets the arrival counters the first one left
            out.fill_(float("nan"))
            kernel.launch(1, pool, qkv, tables, ints(contexts), out, splits=splits)

            for row, context in enumerate(contexts):
                if context == 0:
                    assert not out[row].any()
                    continue
                key, value = reference.read_kv(pool, layout, dtype, 1, tables[row], context)
                q = qkv[row : row + 1, : heads * head_dim].view(1, heads, head_dim)
                expected = reference.attention(q, key, value, context - 1, layout)
                assert relative_error(out[row].view(1, heads, head_dim), expected) < ATTENTION_TOLERANCE[dtype], (
                    row,
                    lib.arch,
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), [*ATTENTION_SHAPES[:4], *ATTENTION_SHAPES[-3:]])
@pytest.mark.parametrize("window", [0, 40])
def test_attention_scalar(
    heads: int, kv_heads: int, head_dim: int, block: int, window: int, dtype: torch.dtype
) -> None:
    layout, chunks = make_layout(heads, kv_heads, head_dim, block, dtype, window), [(0, 5), (70, 1), (33, 40)]
    pool, tables = paged_sequences([start + count for start, count in chunks], layout, dtype)
    sequences = ints([row for row, (_, count) in enumerate(chunks) for _ in range(count)])
    positions = ints([start + i for start, count in chunks for i in range(count)])
    q, out = (
        randn(len(positions), heads * head_dim, dtype=dtype),
        poisoned(len(positions), heads * head_dim, dtype=dtype),
    )

    AttentionScalar(library(dtype), layout).launch(0, pool, q, tables, sequences, positions, out)

    begin = 0
    for row, (start, count) in enumerate(chunks):
        key, value = reference.read_kv(pool, layout, dtype, 0, tables[row], start + count)
        expected = reference.attention(q[begin : begin + count].view(count, heads, head_dim), key, value, start, layout)
        assert relative_error(out[begin : begin + count].view_as(expected), expected) < ATTENTION_TOLERANCE[dtype]
        begin += count


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), ATTENTION_SHAPES)
@pytest.mark.parametrize("window", [0, 33, 200])
def test_attention_prefill(heads: int, kv_heads: int, head_dim: int, block: int, window: int) -> None:
    dtype, chunks = torch.bfloat16, [(0, 1), (0, 130), (77, 1), (300, 65), (0, 700), (1000, 24)]
    layout = make_layout(heads, kv_heads, head_dim, block, dtype, window)
    for lib in libraries(dtype):
        pool, tables = paged_sequences([start + count for start, count in chunks], layout, dtype)
        starts, counts = (np.array(column, dtype=np.int32) for column in zip(*chunks, strict=True))
        tiles = make_tiles(np.arange(len(chunks), dtype=np.int32), starts, counts, 3, heads // kv_heads)
        tokens = 3 + int(counts.sum())
        qkv, out = (
            randn(tokens, layout.qkv_width, dtype=dtype),
            torch.full((tokens, heads * head_dim), 7.0, dtype=dtype, device="cuda"),
        )

        AttentionPrefill(lib, layout).launch(1, pool, qkv, tables, ints(tiles), out)

        assert (out[:3] == 7).all(), "rows of no chunk were touched"
        begin = 3
        for row, (start, count) in enumerate(chunks):
            key, value = reference.read_kv(pool, layout, dtype, 1, tables[row], start + count)
            q = qkv[begin : begin + count, : heads * head_dim].reshape(count, heads, head_dim)
            expected = reference.attention(q, key, value, start, layout)
            got = out[begin : begin + count].view_as(expected)
            assert relative_error(got, expected) < ATTENTION_TOLERANCE[dtype], (row, lib.arch)
            begin += count


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 4, 256), (8, 2, 128)])
def test_attention_bounds_its_scores_as_gemma_2_does(heads: int, kv_heads: int, head_dim: int) -> None:
    """A scale that carries most scores far over the cap: without the bound the weights would be those of other tokens."""
    dtype, chunks, rule = torch.bfloat16, [(0, 130), (200, 65)], {"scale": 0.5, "softcap": 5.0}
    layout = make_layout(heads, kv_heads, head_dim, 16, dtype)
    for lib in libraries(dtype):
        pool, tables = paged_sequences([start + count for start, count in chunks], layout, dtype)
        starts, counts = (np.array(column, dtype=np.int32) for column in zip(*chunks, strict=True))
        tiles = make_tiles(np.arange(2, dtype=np.int32), starts, counts, 0, heads // kv_heads)
        qkv, out = randn(195, layout.qkv_width, dtype=dtype), poisoned(195, heads * head_dim, dtype=dtype)
        AttentionPrefill(lib, layout, **rule).launch(1, pool, qkv, tables, ints(tiles), out)
        last = qkv[[129, 194]].contiguous()
        decoded = poisoned(2, heads * head_dim, dtype=dtype)
        kernel = AttentionDecode(lib, layout, max_rows=32, max_context=2048, **rule)
        kernel.launch(1, pool, last, tables, ints([130, 265]), decoded)

        begin = 0
        for row, (start, count) in enumerate(chunks):
            key, value = reference.read_kv(pool, layout, dtype, 1, tables[row], start + count)
            q = qkv[begin : begin + count, : heads * head_dim].reshape(count, heads, head_dim)
            expected = reference.attention(q, key, value, start, layout, **rule)
            got = out[begin : begin + count].view_as(expected)
            assert relative_error(got, expected) < ATTENTION_TOLERANCE[dtype], (row, lib.arch)
            got = decoded[row].view_as(expected[-1])
            assert relative_error(got, expected[-1]) < ATTENTION_TOLERANCE[dtype], (row, lib.arch)
            begin += count


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("broken", ["key", "value", "query"])
def test_attention_hands_on_what_is_not_a_number(broken: str, splits: int) -> None:
    """A broken row must reach the logits as NaN (zeros in its place would be served), and its neighbour must not."""
    dtype, context = torch.bfloat16, 640
    layout = make_layout(8, 2, 64, 16, dtype)
    for lib in libraries(dtype):
        pool, tables = paged_sequences([context, context], layout, dtype)
        qkv, out = randn(2, layout.qkv_width, dtype=dtype), poisoned(2, 512, dtype=dtype)
        plane = layout.page_bytes // 4  # of two layers' K and V
        if broken == "query":
            qkv[0] = float("nan")
        else:
            first = 2 * plane if broken == "key" else 3 * plane
            pool[tables[0].long(), first : first + plane] = 255

        AttentionDecode(lib, layout, max_rows=32, max_context=2048).launch(
            1, pool, qkv, tables, ints([context, context]), out, splits=splits
        )

        assert out[0].isnan().all()
        assert out[1].isfinite().all()
        out.fill_(0)
        starts = np.full(2, context - 1, dtype=np.int32)
        tiles = make_tiles(np.arange(2, dtype=np.int32), starts, np.ones(2, dtype=np.int32), 0, 4)
        AttentionPrefill(lib, layout).launch(1, pool, qkv, tables, ints(tiles), out)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
