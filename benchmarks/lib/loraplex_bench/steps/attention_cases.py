"""Attention over paged keys and values, timed alone: decode as the baselines have it, and chunks of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.prefill import AttentionPrefill, make_tiles

from loraplex_bench.steps.kernel_timer import require_close, time_us

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

Case = dict[str, str]
PREFILL_CHUNKS = ((2048, 0, 1), (512, 3584, 4), (256, 0, 32))  # tokens, cached tokens, sequences
PEAK_FLOPS = 787e12


def attention_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time paged decode attention; each layer is a set of K and V."""
    device = library.device
    batch, context, heads, kv_heads = (int(row[key]) for key in ("batch", "context", "q_heads", "kv_heads"))
    head_dim, block = int(row["head_dim"]), int(row["page_tokens"])
    layer_bytes = 2 * kv_heads * block * head_dim * 2
    pages = batch * context // block
    layers = max(2, min(8, (24 << 30) // (pages * layer_bytes)))
    kv = KvLayout(
        page_bytes=layers * layer_bytes, block_tokens=block, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    pool = torch.randn(pages * layers * layer_bytes // 2, device=device, dtype=torch.bfloat16).view(torch.uint8)
    pool = pool.view(pages, -1)
    tables = torch.randperm(pages, device=device).int().view(batch, -1)
    q = torch.randn(batch, kv.qkv_width, device=device, dtype=torch.bfloat16)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    out = torch.full((batch, heads * head_dim), float("nan"), device=device, dtype=torch.bfloat16)
    kernel = AttentionDecode(library, kv, max_rows=8 * batch, max_context=context)
    kernel.launch(0, pool, q, tables, lens, out)
    for sequence in range(2):
        key, value = reference.read_kv(pool, kv, torch.bfloat16, 0, tables[sequence], context)
        query = q[sequence : sequence + 1, : heads * head_dim].view(1, heads, head_dim)
        require_close(
            out[sequence].view(1, heads, -1), reference.attention(query, key, value, context - 1, kv), str(row)
        )
    chosen = kernel.splits(batch)
    times = {}
    for splits in sorted({chosen, 1, 2, 4, 8}):
        calls = [
            lambda layer=layer, s=splits: kernel.launch(layer, pool, q, tables, lens, out, splits=s)
            for layer in range(layers)
        ]
        if splits <= max(2, chosen * 2):
            times["op" if splits == chosen else f"splits{splits}"] = time_us(calls, flush)
    return times


def attention_prefill_rows() -> list[Case]:
    """Our own cases, Llama-3-8B heads; the floor is arithmetic at the measured GEMM rate, there is no peer."""
    rows = []
    for tokens, cached, sequences in PREFILL_CHUNKS:
        flops = 4 * 32 * 128 * sequences * sum(cached + i + 1 for i in range(tokens))
        rows.append(
            {
                "tokens": str(tokens),
                "cached": str(cached),
                "sequences": str(sequences),
                "floor_us": f"{flops / PEAK_FLOPS * 1e6:.2f}",
            }
        )
    return rows


def attention_prefill_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time chunked prefill attention, 32 heads, 8 KV heads, head size 128, pages of 16 tokens."""
    device = library.device
    tokens, cached, sequences = (int(row[key]) for key in ("tokens", "cached", "sequences"))
    layers, context = 4, tokens + cached
    kv = KvLayout(page_bytes=layers * 65536, block_tokens=16, num_heads=32, num_kv_heads=8, head_dim=128)
    pool = torch.randn(sequences * context // 16 * layers * 32768, device=device, dtype=torch.bfloat16).view(
        torch.uint8
    )
    pool = pool.view(-1, kv.page_bytes)
    tables = torch.randperm(len(pool), device=device).int().view(sequences, -1)
    q = torch.randn(sequences * tokens, kv.qkv_width, device=device, dtype=torch.bfloat16)
    out = torch.full((sequences * tokens, 4096), float("nan"), device=device, dtype=torch.bfloat16)
    numbers = np.arange(sequences, dtype=np.int32)
    made = make_tiles(numbers, np.full_like(numbers, cached), np.full_like(numbers, tokens), 0, 4)
    tiles, kernel = torch.from_numpy(made).to(device), AttentionPrefill(library, kv)
    kernel.launch(0, pool, q, tables, tiles, out)
    key, value = reference.read_kv(pool, kv, torch.bfloat16, 0, tables[0], context)
    expected = reference.attention(q[:tokens, :4096].view(tokens, 32, 128), key, value, cached, kv)
    require_close(out[:tokens].view(tokens, 32, 128), expected, str(row))
    calls = [lambda layer=layer: kernel.launch(layer, pool, q, tables, tiles, out) for layer in range(layers)]
    return {"op": time_us(calls, flush)}
