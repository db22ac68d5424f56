"""Keys and values as e4m3 on the GPU: decode, prefill and scalar attention against fp32 over what the pages hold, and the write."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.gpu_tensors import ATTENTION_TOLERANCE, ints, libraries, poisoned, randn
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.prefill import AttentionPrefill, make_tiles
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.attention.scalar import AttentionScalar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
LAYERS, LAYER = 2, 1
SHAPES = [(8, 8, 64, 16), (6, 2, 80, 16), (32, 32, 96, 8), (32, 8, 128, 16), (8, 4, 256, 16)]


def make_layout(heads: int, kv_heads: int, head_dim: int, block: int, window: int = 0) -> KvLayout:
    rows = LAYERS * 2 * kv_heads * block
    return KvLayout(
        page_bytes=-(-rows * (head_dim + 2) // 128) * 128,
        block_tokens=block,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        scales_offset=rows * head_dim,
    )


def written(layout: KvLayout, contexts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool that the kernel itself wrote, of tokens of very different sizes; the rest of it is NaN."""
    size = layout.block_tokens
    blocks = [-(-context // size) for context in contexts]
    order, begin = torch.randperm(sum(blocks) + 1).tolist(), 0
    pool = torch.full((sum(blocks) + 1, layout.page_bytes), 255, dtype=torch.uint8, device="cuda")
    tables = torch.full((len(contexts), max(blocks)), -1, dtype=torch.int32)
    slots: list[int] = []
    positions: list[int] = []
    for row, (context, count) in enumerate(zip(contexts, blocks, strict=True)):
        tables[row, :count] = torch.tensor(order[begin : begin + count], dtype=torch.int32)
        begin += count
        slots += [int(tables[row, at // size]) * size + at % size for at in range(context)]
        positions += range(context)
    heads = layout.num_heads + 2 * layout.num_kv_heads
    qkv = randn(len(slots), heads, layout.head_dim, dtype=torch.float32)
    qkv *= 10 ** (2 * torch.rand(len(slots), heads, 1, device="cuda") - 1.5)
    rotary = reference.rotary_table(max(contexts), layout.head_dim).cuda()
    for lib in libraries(dtype)[:1]:
        rope = RopeKv(lib, layout, pool, rotary)
        for layer in range(LAYERS):
            rope.launch(layer, qkv.to(dtype).flatten(1).contiguous(), ints(positions), ints(slots))
    first, expected = contexts[0], qkv[: contexts[0], layout.num_heads + layout.num_kv_heads :].to(dtype)
    values, scales = reference.quantise_kv(expected)
    kept = (values.float() * scales.float()[..., None]).to(dtype)
    assert torch.equal(reference.read_kv(pool, layout, dtype, LAYER, tables[0].cuda(), first)[1], kept)
    return pool, tables.cuda()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), SHAPES)
@pytest.mark.parametrize(("window", "splits"), [(0, None), (0, 5), (33, 1)])
def test_decode_attention(
    heads: int, kv_heads: int, head_dim: int, block: int, window: int, splits: int | None
) -> None:
    dtype, contexts = torch.bfloat16, [1, 17, 500, 1999]
    layout = make_layout(heads, kv_heads, head_dim, block, window)
    pool, tables = written(layout, contexts, dtype)
    for lib in libraries(dtype):
        qkv, out = randn(4, layout.qkv_width, dtype=dtype), poisoned(4, heads * head_dim, dtype=dtype)
        kernel = AttentionDecode(lib, layout, max_rows=32, max_context=2048)

        kernel.launch(LAYER, pool, qkv, tables, ints(contexts), out, splits=splits)

        for row, context in enumerate(contexts):
            key, value = reference.read_kv(pool, layout, dtype, LAYER, tables[row], context)
            q = qkv[row : row + 1, : heads * head_dim].view(1, heads, head_dim)
            expected = reference.attention(q, key, value, context - 1, layout)
            assert relative_error(out[row].view_as(expected), expected) < ATTENTION_TOLERANCE[dtype], (row, lib.arch)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), SHAPES)
@pytest.mark.parametrize("window", [0, 33])
def test_prefill_attention(heads: int, kv_heads: int, head_dim: int, block: int, window: int) -> None:
    dtype, chunks = torch.bfloat16, [(0, 1), (0, 130), (300, 65), (0, 700)]
    layout = make_layout(heads, kv_heads, head_dim, block, window)
    pool, tables = written(layout, [start + count for start, count in chunks], dtype)
    starts, counts = (np.array(column, dtype=np.int32) for column in zip(*chunks, strict=True))
    tiles = make_tiles(np.arange(len(chunks), dtype=np.int32), starts, counts, 0, heads // kv_heads)
    for lib in libraries(dtype):
        tokens = int(counts.sum())
        qkv, out = randn(tokens, layout.qkv_width, dtype=dtype), poisoned(tokens, heads * head_dim, dtype=dtype)

        AttentionPrefill(lib, layout).launch(LAYER, pool, qkv, tables, ints(tiles), out)

        begin = 0
        for row, (start, count) in enumerate(chunks):
            key, value = reference.read_kv(pool, layout, dtype, LAYER, tables[row], start + count)
            q = qkv[begin : begin + count, : heads * head_dim].reshape(count, heads, head_dim)
            expected = reference.attention(q, key, value, start, layout)
            got = out[begin : begin + count].view_as(expected)
            assert relative_error(got, expected) < ATTENTION_TOLERANCE[dtype], (row, lib.arch)
            begin += count


def test_scalar_attention_in_fp32() -> None:
    dtype, layout = torch.float32, make_layout(6, 2, 80, 16)
    pool, tables = written(layout, [100], dtype)
    q, out = randn(3, 6 * 80, dtype=dtype), poisoned(3, 6 * 80, dtype=dtype)

    AttentionScalar(libraries(dtype)[0], layout).launch(LAYER, pool, q, tables, ints([0] * 3), ints([97, 98, 99]), out)

    key, value = reference.read_kv(pool, layout, dtype, LAYER, tables[0], 100)
    expected = reference.attention(q.view(3, 6, 80), key, value, 97, layout)
    assert relative_error(out.view_as(expected), expected) < ATTENTION_TOLERANCE[dtype]
