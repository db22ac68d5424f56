"""Tensor-core kernels of prefill, run lane by lane on the CPU under sanitizers: clusters, copies and mma emulated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import AdapterPool, make_geometry, relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.prefill import AttentionPrefill, make_tiles
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.prefill import LoraPrefill
from loraplex_kernels.lora.tables import AdapterTables

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "head_dim", "softcap"),
    [(2, 1, 0, 64, None), (3, 1, 33, 64, None), (2, 1, 33, 96, None), (2, 2, 0, 256, 1.5)],
)
def test_attention_prefill_reads_pages(
    host_library: MakeHostLibrary, heads: int, kv_heads: int, window: int, head_dim: int, softcap: float | None
) -> None:
    dtype, block, chunks = torch.bfloat16, 4, [(0, 1), (70, 66)]
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

    rule: dict[str, float] = {} if softcap is None else {"scale": 0.3, "softcap": softcap}
    AttentionPrefill(library, layout, **rule).launch(0, pool, q, tables, torch.from_numpy(tiles), out)

    assert (out[0] == 7).all(), "a row of no chunk was touched"
    begin = 1
    for row, (start, count) in enumerate(chunks):
        key, value = reference.read_kv(pool, layout, dtype, 0, tables[row], start + count)
        query = q[begin : begin + count, : heads * head_dim].reshape(count, heads, head_dim)
        expected = reference.attention(query, key, value, start, layout, **rule)
        assert relative_error(out[begin : begin + count].view_as(expected), expected) < 6e-3
        begin += count


RANKS = {
    "plain": {"q_proj": 72, "v_proj": 3, "o_proj": 24, "gate_proj": 8, "down_proj": 1},
    "tiles of 32 columns": {"q_proj": 256, "k_proj": 8, "v_proj": 65, "gate_proj": 256, "up_proj": 200},
    "tiles of 16 columns": {"q_proj": 256, "k_proj": 256, "v_proj": 256, "o_proj": 256},
    "tiles of 8 columns": {"q_proj": 512, "k_proj": 512, "v_proj": 8, "o_proj": 320, "gate_proj": 301, "up_proj": 3},
}


@pytest.mark.parametrize("ranks", list(RANKS))
@pytest.mark.parametrize(("cluster", "page_bytes"), [(1, 64 * 1024), (4, 1024 * 1024)])  # large: no matrix is divided
def test_lora_prefill_adds_what_each_chunks_adapter_adds(
    host_library: MakeHostLibrary, ranks: str, cluster: int, page_bytes: int
) -> None:
    rng, library = np.random.default_rng(7), host_library(torch.bfloat16)
    geometry = make_geometry(hidden=200, inter=72, heads=3, kv_heads=1, head_dim=64, layers=1, page_bytes=page_bytes)
    resident = AdapterPool(geometry, 2**22 // page_bytes, rng)
    resident.add_uniform(16)  # tiles of 64 columns and more, in the same launch
    resident.add({(0, name): rank for name, rank in RANKS[ranks].items()})
    tables = AdapterTables(geometry, max_adapters=2, tile_capacity=256, device=library.device)
    for index, adapter in enumerate(resident.adapters):
        tables.bind(index, adapter.spec, adapter.pages)
    pool, shapes = torch.from_numpy(resident.pages), op_shapes(geometry)
    lora = LoraPrefill(library, tables, pool, shapes, max_items=64, clusters=(cluster,), residencies=(3,))
    library.track(pool, tables.tiles, tables.entries, lora.buffer)
    adapters, counts = np.array([0, -1, 1], dtype=np.int32), np.array([67, 2, 5], dtype=np.int32)
    of_token = np.concatenate([[-1], np.repeat(adapters, counts)]).astype(np.int32)
    scales = rng.uniform(0.5, 2, len(of_token)).astype(np.float32)
    lora.prepare(adapters, counts, 1)
    for op, shape in zip(("qkv", "o", "gate_up", "down"), shapes, strict=True):
        x = torch.randn(len(of_token), shape.columns).bfloat16()
        y = (0.3 * torch.randn(len(of_token), sum(shape.outputs))).bfloat16()
        before, expected = y.clone(), y + resident.delta(of_token, scales, x, 0, op)

        lora.apply(0, op, x, torch.from_numpy(scales), y)

        assert relative_error(y, expected) < 4e-3, op
        assert torch.equal(y[of_token < 0], before[of_token < 0]), op
