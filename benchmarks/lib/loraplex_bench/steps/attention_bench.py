"""One layer's paged decode attention of Llama-3-8B's heads over keys and values in bf16 or FP8, timed alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import torch
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout

from loraplex_bench.steps.kernel_timer import require_close, time_us

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

HEADS, KV_HEADS, HEAD_DIM, BLOCK, LAYERS = 32, 8, 128, 16, 4
KV_ROWS: Final = 2 * KV_HEADS * BLOCK


def layout_of(*, is_fp8: bool) -> KvLayout:
    """Return pages of `LAYERS` layers."""
    values = LAYERS * KV_ROWS * HEAD_DIM * (1 if is_fp8 else 2)
    return KvLayout(
        page_bytes=values + (LAYERS * KV_ROWS * 2 if is_fp8 else 0),
        block_tokens=BLOCK,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        scales_offset=values if is_fp8 else None,
    )


def random_pages(layout: KvLayout, pages: int, device: torch.device) -> torch.Tensor:
    """Return pages of normal keys and values."""
    kv = torch.randn(pages, LAYERS, 2, KV_HEADS, BLOCK, HEAD_DIM, device=device, dtype=torch.bfloat16)
    if layout.scales_offset is None:
        return kv.view(pages, -1).view(torch.uint8)
    values, scales = reference.quantise_kv(kv)
    pool = torch.empty(pages, layout.page_bytes, dtype=torch.uint8, device=device)
    pool[:, : layout.scales_offset] = values.view(torch.uint8).view(pages, -1)
    pool[:, layout.scales_offset :] = scales.permute(0, 1, 3, 4, 2).contiguous().view(torch.uint8).view(pages, -1)
    return pool


def attention_us(
    library: KernelLibrary, layout: KvLayout, flush: torch.Tensor, *, rows: int, context: int
) -> tuple[float, int]:
    """Return the time of one layer's attention, in microseconds, and the bytes that it must read."""
    device, width, blocks = library.device, HEADS * HEAD_DIM, -(-context // BLOCK)
    pool = random_pages(layout, rows * blocks, device)
    tables = torch.randperm(len(pool), device=device).int().view(rows, -1)
    q = torch.randn(rows, layout.qkv_width, device=device, dtype=torch.bfloat16)
    lens = torch.full((rows,), context, dtype=torch.int32, device=device)
    out = torch.full((rows, width), float("nan"), device=device, dtype=torch.bfloat16)
    kernel = AttentionDecode(library, layout, max_rows=rows, max_context=context)
    kernel.launch(1, pool, q, tables, lens, out)
    key, value = reference.read_kv(pool, layout, torch.bfloat16, 1, tables[3], context)
    expected = reference.attention(q[3:4, :width].view(1, HEADS, HEAD_DIM), key, value, context - 1, layout)
    require_close(out[3].view(1, HEADS, HEAD_DIM), expected, f"scales at {layout.scales_offset}")
    calls = [functools.partial(kernel.launch, layer, pool, q, tables, lens, out) for layer in range(LAYERS)]
    return time_us(calls, flush), layout.page_bytes // LAYERS * rows * context // BLOCK
