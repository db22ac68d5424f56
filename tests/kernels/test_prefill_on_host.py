"""Tensor-core kernels of prefill, run lane by lane on the CPU under sanitizers: clusters, copies and mma emulated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention_prefill import AttentionPrefill, make_tiles
from loraplex_kernels.paged_kv import KvLayout

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 1, 0), (3, 1, 33)])
def test_attention_prefill_reads_pages(host_library: MakeHostLibrary, heads: int, kv_heads: int, window: int) -> None:
    dtype, head_dim, block, chunks = torch.bfloat16, 64, 4, [(0, 1), (70, 66)]
    library, page_bytes = host_library(dtype), 2 * kv_heads * block * head_dim * 2
    layout = KvLayout(
        page_bytes=page_bytes,
        block_tokens=block,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
    )
    pool = torch.randn(40, page_bytes // 2).to(dtype).view(torch.uint8)
    tables = torch.from_numpy(np.random.default_rng(6).permutation(40).astype(np.int32)[:68]).view(1, -1).repeat(2, 1)
    starts, counts = (np.array(column, dtype=np.int32) for column in zip(*chunks, strict=True))
    tiles = make_tiles(np.arange(2, dtype=np.int32), starts, counts, 1, heads // kv_heads)
    tokens = 1 + int(counts.sum())
    q, out = torch.randn(tokens, layout.qkv_width).to(dtype), torch.full((tokens, heads * head_dim), 7.0).to(dtype)

    AttentionPrefill(library, layout).launch(0, pool, q, tables, torch.from_numpy(tiles), out)

    assert (out[0] == 7).all(), "a row of no chunk was touched"
    begin = 1
    for row, (start, count) in enumerate(chunks):
        key, value = reference.read_kv(pool, layout, dtype, 0, tables[row], start + count)
        query = q[begin : begin + count, : heads * head_dim].reshape(count, heads, head_dim)
        expected = reference.attention(query, key, value, start, layout)
        assert relative_error(out[begin : begin + count].view_as(expected), expected) < 6e-3
        begin += count
