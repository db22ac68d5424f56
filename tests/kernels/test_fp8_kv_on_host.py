"""Keys and values as e4m3: written with their scales, and read by every attention kernel, on the CPU under sanitizers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.prefill import AttentionPrefill, make_tiles
from loraplex_kernels.attention.rope_kv import RopeKv, RopeStyle
from loraplex_kernels.attention.scalar import AttentionScalar

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
BLOCK, CONTEXTS = 4, (1, 0, 150)


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    torch.manual_seed(11)


def fp8_layout(head_dim: int, *, window: int = 0) -> KvLayout:
    return KvLayout(
        page_bytes=2 * BLOCK * (head_dim + 2),
        block_tokens=BLOCK,
        num_heads=3,
        num_kv_heads=1,
        head_dim=head_dim,
        window=window,
        scales_offset=2 * BLOCK * head_dim,
    )


def paged_fp8(layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `paged`, of e4m3: K and V of tokens of very different sizes, some of them zero or below e4m3's normal numbers."""
    blocks = -(-max(CONTEXTS) // BLOCK)
    pool = torch.full((blocks + 2, layout.page_bytes), 255, dtype=torch.uint8)
    kv = torch.randn(blocks + 1, 2, BLOCK, layout.head_dim) * 10 ** (4 * torch.rand(blocks + 1, 2, BLOCK, 1) - 3)
    kv *= torch.where(torch.rand(kv.shape) < 0.1, 1e-3, 1.0)
    kv[0, :, 1] = 0
    values, scales = reference.quantise_kv(kv)
    pool[:-1, : layout.scales_offset] = values.view(torch.uint8).reshape(blocks + 1, -1)
    pool[:-1, layout.scales_offset :] = scales.transpose(1, 2).contiguous().view(torch.uint8).reshape(blocks + 1, -1)
    order = np.random.default_rng(6).permutation(blocks + 1).astype(np.int32)
    tables = torch.full((len(CONTEXTS), blocks), blocks + 1, dtype=torch.int32)
    tables[0, 0], tables[2] = int(order[0]), torch.from_numpy(order[1:])
    return pool, tables


@pytest.mark.parametrize(("head_dim", "window", "splits"), [(64, 40, 2), (80, 0, 1)])
def test_decode_attention_reads_fp8_with_a_scale_for_each_token(
    host_library: MakeHostLibrary, head_dim: int, window: int, splits: int
) -> None:
    dtype, layout = torch.bfloat16, fp8_layout(head_dim, window=window)
    pool, tables = paged_fp8(layout)
    q = torch.randn(len(CONTEXTS), layout.qkv_width).to(dtype)
    kernel = AttentionDecode(host_library(dtype), layout, max_rows=8, max_context=256)
    kernel._library.track(kernel._partial_out, kernel._partial_stats, kernel._arrivals)  # type: ignore[attr-defined]
    out = torch.full((len(CONTEXTS), 3 * head_dim), float("nan")).to(dtype)

    kernel.launch(0, pool, q, tables, torch.tensor(CONTEXTS, dtype=torch.int32), out, splits=splits)

    for row in (0, 2):
        key, value = reference.read_kv(pool, layout, dtype, 0, tables[row], CONTEXTS[row])
        query = q[row, : 3 * head_dim].view(1, 3, head_dim)
        expected = reference.attention(query, key, value, CONTEXTS[row] - 1, layout)
        assert relative_error(out[row].view_as(expected), expected) < 6e-3


@pytest.mark.parametrize("head_dim", [80, 128])
def test_prefill_attention_reads_fp8_with_a_scale_for_each_token(host_library: MakeHostLibrary, head_dim: int) -> None:
    dtype, layout, start, count = torch.bfloat16, fp8_layout(head_dim), 70, 66
    pool, tables = paged_fp8(layout)
    one = np.ones(1, dtype=np.int32)
    tiles = torch.from_numpy(make_tiles(2 * one, start * one, count * one, 0, 3))
    q, out = torch.randn(count, layout.qkv_width).to(dtype), torch.full((count, 3 * head_dim), float("nan")).to(dtype)

    AttentionPrefill(host_library(dtype), layout).launch(0, pool, q, tables, tiles, out)

    key, value = reference.read_kv(pool, layout, dtype, 0, tables[2], start + count)
    query = q[:, : 3 * head_dim].reshape(count, 3, head_dim)
    expected = reference.attention(query, key, value, start, layout)
    assert relative_error(out.view_as(expected), expected) < 6e-3


@pytest.mark.parametrize("broken", ["key", "value"])
def test_fp8_hands_on_what_is_not_a_number(host_library: MakeHostLibrary, broken: str) -> None:
    """A row's scale says that one of its values is not a number; its neighbour's answer does not."""
    dtype, layout = torch.bfloat16, fp8_layout(64)
    _, scales = reference.quantise_kv(torch.tensor([1.0, float("inf")]))
    assert scales.isnan()
    pool, tables = paged_fp8(layout)
    first = layout.scales_offset or 0
    page = pool[int(tables[0, 0]), first : first + 4].view(torch.bfloat16)
    page[0 if broken == "key" else 1] = scales
    q, out = torch.randn(2, layout.qkv_width).to(dtype), torch.zeros(2, 3 * 64).to(dtype)
    kernel = AttentionDecode(host_library(dtype), layout, max_rows=8, max_context=256)
    kernel._library.track(kernel._partial_out, kernel._partial_stats, kernel._arrivals)  # type: ignore[attr-defined]

    kernel.launch(0, pool, q, tables[[0, 2]].contiguous(), torch.tensor([1, 150], dtype=torch.int32), out, splits=1)

    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_scalar_attention_reads_fp8_exactly(host_library: MakeHostLibrary) -> None:
    layout = fp8_layout(64)
    pool, tables = paged_fp8(layout)
    q, out = torch.randn(2, 3 * 64), torch.full((2, 3 * 64), float("nan"))
    sequences, positions = torch.tensor([2, 2], dtype=torch.int32), torch.tensor([148, 149], dtype=torch.int32)

    AttentionScalar(host_library(torch.float32), layout).launch(0, pool, q, tables, sequences, positions, out)

    key, value = reference.read_kv(pool, layout, torch.float32, 0, tables[2], 150)
    expected = reference.attention(q.view(2, 3, 64), key, value, 148, layout)
    assert relative_error(out.view_as(expected), expected) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "head_dim", "whole"),
    [(torch.bfloat16, 64, False), (torch.float32, 80, False), (torch.bfloat16, 80, True)],
)
def test_a_token_is_written_as_e4m3_with_a_scale_for_each_head(
    host_library: MakeHostLibrary, dtype: torch.dtype, head_dim: int, whole: bool
) -> None:
    heads, kv_heads, layers, layer = 4, 2, 2, 1
    count = layers * 2 * kv_heads * BLOCK
    layout = KvLayout(
        page_bytes=count * (head_dim + 2),
        block_tokens=BLOCK,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scales_offset=count * head_dim,
    )
    library, pool = host_library(dtype), torch.full((3, layout.page_bytes), 255, dtype=torch.uint8)
    qkv = (torch.randn(4, 8, head_dim) * 10 ** (3 * torch.rand(4, 8, 1) - 2)).to(dtype)
    qkv[0, 6:, ::3] *= 1e-4
    qkv[2, 7] = 0
    qkv[3, 6, 7] = float("inf")
    positions, slots = torch.tensor([5, 2, 11, 0]).int(), torch.tensor([8, -1, 5, 11]).int()
    rotary = reference.rotary_table(16, head_dim)
    weights = torch.rand(6 * head_dim).to(dtype)
    norms = {"q_norm": weights[: 4 * head_dim], "k_norm": weights[4 * head_dim :]} if whole else {}
    given = qkv.clone()

    rope = RopeKv(library, layout, pool, rotary, style=RopeStyle(norms_whole=whole))
    rope.launch(layer, qkv.view(4, -1), positions, slots, **norms)

    pages = torch.tensor([1, 2])
    key, value = reference.read_kv(pool, layout, torch.float32, layer, pages, 8)
    if whole:
        rows = given[:, 4:6].reshape(4, -1)
        given[:, 4:6] = reference.rms_norm(rows, norms["k_norm"], 1e-6).to(dtype).view(4, 2, head_dim)
    rotated = reference.rope(given[:, 4:6], rotary, positions).to(dtype)
    for token, place in ((0, 4), (2, 1), (3, 7)):
        values, scales = reference.quantise_kv(given[token, 6:])
        kept = values.float() * scales.float()[:, None]
        assert torch.equal(value[place].isnan(), kept.isnan())
        assert torch.equal(value[place].nan_to_num(), kept.nan_to_num())
        values, scales = reference.quantise_kv(rotated[token])
        assert relative_error(key[place], values.float() * scales.float()[:, None]) < 2e-2
    written = torch.zeros(3, BLOCK, dtype=torch.bool)
    written[2, 0] = written[1, 1] = written[2, 3] = True
    half = pool[:, : layout.scales_offset].view(3, layers, 2 * kv_heads, BLOCK, head_dim)
    scales_half = pool[:, layout.scales_offset :].view(3, layers, kv_heads, BLOCK, 4)
    assert (half[:, layer].transpose(1, 2)[~written] == 255).all(), (
        "tokens without a slot, and of others, are not touched"
    )
    assert (scales_half[:, layer].transpose(1, 2)[~written] == 255).all()
    assert (half[:, 0] == 255).all()
    assert (scales_half[:, 0] == 255).all()
