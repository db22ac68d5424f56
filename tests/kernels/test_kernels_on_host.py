"""Kernels without tensor cores, run thread by thread on the CPU under address and undefined-behaviour sanitizers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import AdapterPool, make_adapters, make_geometry, relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.attention.scalar import AttentionScalar
from loraplex_kernels.lora import items
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes, range_index
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
DELTA_OPS = frozenset({"qkv", "gate_up"})
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize(("hidden", "dtype"), [(64, torch.float32), (576, torch.bfloat16)])
def test_rms_norm_adds_the_residual_and_norms(host_library: MakeHostLibrary, dtype: torch.dtype, hidden: int) -> None:
    library, generator = host_library(dtype), torch.Generator().manual_seed(hidden)
    x, residual = (torch.randn(3, hidden, generator=generator).to(dtype) for _ in range(2))
    weight, out = torch.randn(hidden, generator=generator).to(dtype), poisoned(3, hidden, dtype=dtype)
    expected, total = reference.rms_norm(x, weight, 1e-5, residual), x + residual

    RmsNorm(library, hidden, 1e-5).launch(x, weight, out, residual=residual)

    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(residual, total)


def test_rms_norm_of_chosen_rows_leaves_the_residual_alone(host_library: MakeHostLibrary) -> None:
    library, residual = host_library(torch.float32), torch.randn(5, 64)
    before, rows, out = residual.clone(), torch.tensor([4, 0], dtype=torch.int32), torch.empty(2, 64)

    RmsNorm(library, 64, 1e-6).launch(None, torch.ones(64), out, residual=residual, rows=rows)

    assert relative_error(out, reference.rms_norm(before[[4, 0]], torch.ones(64), 1e-6)) < 1e-5
    assert torch.equal(residual, before)


def test_rms_norm_of_padding_is_zero_and_touches_no_row(host_library: MakeHostLibrary) -> None:
    x, residual = torch.randn(5, 64), torch.randn(5, 64)
    expected, rows = residual.clone(), torch.tensor([2, 0, -1, -1], dtype=torch.int32)
    expected[[2, 0]] += x[[2, 0]]
    out = poisoned(4, 64, dtype=torch.float32)

    RmsNorm(host_library(torch.float32), 64, 1e-6).launch(x, torch.ones(64), out, residual=residual, rows=rows)

    assert relative_error(out[:2], reference.rms_norm(expected[[2, 0]], torch.ones(64), 1e-6)) < 1e-5
    assert not out[2:].any()
    assert torch.equal(residual, expected)


def test_silu_mul(host_library: MakeHostLibrary) -> None:
    dtype = torch.bfloat16
    gate_up, out = (torch.randn(3, 2 * 136) * 3).to(dtype), poisoned(3, 136, dtype=dtype)

    SiluMul(host_library(dtype), 136).launch(gate_up, out)

    assert relative_error(out, reference.silu_mul(gate_up)) < TOLERANCE[dtype]


def test_embedding_takes_unknown_tokens_from_the_device_and_zeroes_strangers(host_library: MakeHostLibrary) -> None:
    table, out = torch.randn(10, 64), poisoned(4, 64, dtype=torch.float32)
    ids, slots = torch.tensor([3, -1, 9, 10], dtype=torch.int32), torch.tensor([0, 2, 1, 0], dtype=torch.int32)

    Embedding(host_library(torch.float32), 64).launch(
        table, ids, slots, torch.tensor([7, 8, 6], dtype=torch.int32), out
    )

    assert torch.equal(out[:3], table[[3, 6, 9]])
    assert not out[3].any()


@pytest.mark.parametrize(("head_dim", "dtype", "has_norm"), [(64, torch.float32, False), (128, torch.bfloat16, True)])
def test_rope_rotates_q_in_place_and_writes_k_and_v_to_pages(
    host_library: MakeHostLibrary, head_dim: int, dtype: torch.dtype, has_norm: bool
) -> None:
    library, kv_heads, heads, block = host_library(dtype), 2, 4, 4
    page_bytes = 2 * 2 * kv_heads * block * head_dim * dtype.itemsize
    layout = KvLayout(
        page_bytes=page_bytes, block_tokens=block, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    pool, rotary = torch.zeros(5, page_bytes, dtype=torch.uint8), reference.rotary_table(32, head_dim)
    qkv = torch.randn(3, layout.qkv_width).to(dtype)
    before = qkv.clone().view(3, -1, head_dim)
    positions, slots = (
        torch.tensor([9, 0, 31], dtype=torch.int32),
        torch.tensor([4 * 4 + 1, -1, 2 * 4 + 3], dtype=torch.int32),
    )
    norms = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)] if has_norm else [None, None]

    RopeKv(library, layout, pool, rotary).launch(1, qkv, positions, slots, q_norm=norms[0], k_norm=norms[1])

    q, key, value = torch.split(before, [heads, kv_heads, kv_heads], dim=1)
    if norms[0] is not None and norms[1] is not None:
        q, key = reference.rms_norm(q, norms[0], 1e-6), reference.rms_norm(key, norms[1], 1e-6)
    assert relative_error(qkv.view(3, -1, head_dim)[:, :heads], reference.rope(q, rotary, positions)) < TOLERANCE[dtype]
    for token, page, at in ((0, 4, 1), (2, 2, 3)):
        got_key, got_value = reference.read_kv(pool, layout, dtype, 1, torch.tensor([page]), 4)
        assert relative_error(got_key[at], reference.rope(key, rotary, positions)[token]) < TOLERANCE[dtype]
        assert torch.equal(got_value[at], value[token])
    assert not pool[[0, 1, 3]].any()
    assert not pool[:, : page_bytes // 2].any(), "layer 0 was touched"


def make_lora(
    host_library: MakeHostLibrary, ranks: list[int], *, seed: int
) -> tuple[LoraDecode, AdapterPool, HostLibrary]:
    rng, library = np.random.default_rng(seed), host_library(torch.float32)
    geometry = make_geometry(
        dtype="float32", hidden=72, inter=1104, heads=3, kv_heads=1, head_dim=64, page_bytes=32 * 1024
    )
    resident = AdapterPool(geometry, 900, rng)
    for rank in ranks:
        resident.add_uniform(rank)
    resident.add(
        {
            (0, "q_proj"): 3,
            (0, "v_proj"): 20,
            (1, "up_proj"): 5,
            (1, "k_proj"): 2,
            (1, "down_proj"): 17,
            (0, "o_proj"): 1,
        }
    )
    tables = AdapterTables(geometry, max_adapters=8, tile_capacity=4096, device=library.device)
    for index, adapter in enumerate(resident.adapters):
        tables.bind(index, adapter.spec, adapter.pages)
    pool = torch.from_numpy(resident.pages)
    lora = LoraDecode(library, tables, pool, op_shapes(geometry, complete=DELTA_OPS), max_rows=24, max_items=4096)
    library.track(tables.entries, tables.tiles, pool, lora.items.buffer)
    return lora, resident, library


@pytest.mark.parametrize("op", ["qkv", "o", "gate_up", "down"])
def test_shrink_and_expand_add_what_each_rows_adapter_adds(host_library: MakeHostLibrary, op: str) -> None:
    lora, resident, library = make_lora(host_library, [8, 1, 17], seed=1)
    rng = np.random.default_rng(2)
    adapters = make_adapters("uniform", 21, 4, rng)
    scales = rng.uniform(0.5, 2, 21).astype(np.float32)
    shape = lora.builder.shapes[("qkv", "o", "gate_up", "down").index(op)]
    lora.prepare(adapters)
    for layer in range(2):
        x, y, h = torch.randn(21, shape.columns), torch.randn(21, sum(shape.outputs)), lora.new_scratch()
        h.fill_(float("nan"))
        library.track(h)
        expected = y + resident.delta(adapters, scales, x, layer, op)

        lora.shrink(layer, op, x, h, 5)
        lora.expand_add(layer, op, h, torch.from_numpy(scales), y, 7)

        assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("op", ["qkv", "down"])
def test_two_groups_that_share_a_read_of_weights_get_the_bits_of_two_reads(
    host_library: MakeHostLibrary, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    lora, _, library = make_lora(host_library, [8, 1, 17], seed=7)
    adapters = np.array([2] * 21 + [0] * 3, dtype=np.int32)  # groups of 8, 8, 5 and 3
    x = torch.randn(24, lora.builder.shapes[("qkv", "o", "gate_up", "down").index(op)].columns)
    results, counts = [], []
    for most_items in (1000, 0):
        monkeypatch.setattr(items, "SHRINK_WAVE_ITEMS", most_items)
        library.track(h := lora.new_scratch().zero_())
        counts.append(
            int(lora.prepare(adapters).counts[range_index(("qkv", "o", "gate_up", "down").index(op), expand=False)])
        )
        lora.shrink(1, op, x, h, 3)
        results.append(h)

    assert counts[1] < counts[0]
    assert results[0].any()
    assert torch.equal(*results)


@pytest.mark.parametrize("op", ["qkv", "down"])
def test_tiles_narrower_than_64_columns_are_read_right(host_library: MakeHostLibrary, op: str) -> None:
    """In fp32 a tile holds 64 columns of a stacked rank up to 128, 32 columns of one up to 256."""
    lora, resident, library = make_lora(host_library, [83, 50], seed=5)
    adapters, scales = np.array([0, 1, 0, 2], dtype=np.int32), np.ones(4, dtype=np.float32)
    shape, h = lora.builder.shapes[("qkv", "o", "gate_up", "down").index(op)], lora.new_scratch()
    x, y = torch.randn(4, shape.columns), torch.randn(4, sum(shape.outputs))
    expected = y + resident.delta(adapters, scales, x, 0, op)
    h.fill_(float("nan"))
    library.track(h)
    lora.prepare(adapters)

    lora.shrink(0, op, x, h, 9)
    lora.expand_add(0, op, h, torch.from_numpy(scales), y, 9)

    assert relative_error(y, expected) < 1e-5


def test_silu_mul_adds_the_delta_of_adapted_rows(host_library: MakeHostLibrary) -> None:
    lora, resident, library = make_lora(host_library, [4], seed=3)
    adapters, scales = np.array([0, -1, 1, 0, 0], dtype=np.int32), np.ones(5, dtype=np.float32)
    x, gate_up, h, out = (
        torch.randn(5, 72),
        torch.randn(5, 2 * 1104),
        lora.new_scratch(),
        poisoned(5, 1104, dtype=torch.float32),
    )
    delta = poisoned(5, 2 * 1104, dtype=torch.float32)
    library.track(h, delta)
    lora.prepare(adapters)

    lora.shrink(1, "gate_up", x, h, 4)
    lora.expand_delta(1, "gate_up", h, torch.from_numpy(scales), delta, 6)
    SiluMul(library, 1104).launch(gate_up, out, delta=delta)

    assert relative_error(out, reference.silu_mul(gate_up + resident.delta(adapters, scales, x, 1, "gate_up"))) < 1e-5


def test_rope_and_kv_write_add_the_delta_of_adapted_rows(host_library: MakeHostLibrary) -> None:
    lora, resident, library = make_lora(host_library, [4], seed=4)
    adapters, scales = np.array([1, -1, 0], dtype=np.int32), np.full(3, 1.5, dtype=np.float32)
    x, qkv, h = torch.randn(3, 72), torch.randn(3, 5 * 64), lora.new_scratch()
    library.track(h)
    page = int(resident.take(1)[0])
    positions, slots = (
        torch.tensor([5, 2, 11], dtype=torch.int32),
        page * 4 + torch.tensor([0, 3, 2], dtype=torch.int32),
    )
    total = (qkv + resident.delta(adapters, scales, x, 0, "qkv")).view(3, 5, 64)
    delta, rotary = poisoned(3, 5 * 64, dtype=torch.float32), reference.rotary_table(16, 64)
    layout = KvLayout(page_bytes=32 * 1024, block_tokens=4, num_heads=3, num_kv_heads=1, head_dim=64)
    rope = RopeKv(library, layout, torch.from_numpy(resident.pages), rotary)
    library.track(delta)
    lora.prepare(adapters)

    lora.shrink(0, "qkv", x, h, 4)
    lora.expand_delta(0, "qkv", h, torch.from_numpy(scales), delta, 6)
    rope.launch(0, qkv, positions, slots, delta=delta)

    assert relative_error(qkv.view(3, 5, 64)[:, :3], reference.rope(total[:, :3], rotary, positions)) < 1e-5
    key, value = reference.read_kv(torch.from_numpy(resident.pages), layout, torch.float32, 0, torch.tensor([page]), 4)
    assert relative_error(key[[0, 3, 2]], reference.rope(total[:, 3:4], rotary, positions)) < 1e-5
    assert relative_error(value[[0, 3, 2]], total[:, 4:]) < 1e-5


@pytest.mark.parametrize(("window", "dtype"), [(0, torch.float32), (5, torch.float32), (0, torch.bfloat16)])
def test_scalar_attention_reads_pages(host_library: MakeHostLibrary, window: int, dtype: torch.dtype) -> None:
    library, block, head_dim = host_library(dtype), 4, 64
    page_bytes = 2 * 2 * block * head_dim * dtype.itemsize
    layout = KvLayout(
        page_bytes=page_bytes, block_tokens=block, num_heads=5, num_kv_heads=1, head_dim=head_dim, window=window
    )
    pool = torch.randn(12 * page_bytes // dtype.itemsize).to(dtype).view(torch.uint8).view(12, page_bytes)
    tables = torch.from_numpy(np.random.default_rng(5).permutation(12).astype(np.int32)[:11]).view(1, 11)
    q, out = torch.randn(3, 5 * head_dim).to(dtype), poisoned(3, 5 * head_dim, dtype=dtype)
    sequences, positions = torch.tensor([0, 0, -1], dtype=torch.int32), torch.tensor([38, 39, 0], dtype=torch.int32)

    AttentionScalar(library, layout).launch(1, pool, q, tables, sequences, positions, out)

    key, value = reference.read_kv(pool, layout, dtype, 1, tables[0], 40)
    expected = reference.attention(q[:2].view(2, 5, head_dim), key, value, 38, layout)
    assert relative_error(out[:2].view(2, 5, head_dim), expected) < TOLERANCE[dtype]
    assert not out[2].any()


@pytest.mark.parametrize("broken", ["key", "value", "query"])
def test_scalar_attention_hands_on_what_is_not_a_number(host_library: MakeHostLibrary, broken: str) -> None:
    """A broken row must reach the logits as NaN: zeros in its place would be served as an answer."""
    library, block, head_dim = host_library(torch.float32), 4, 64
    page_bytes = 2 * 2 * block * head_dim * 4
    layout = KvLayout(page_bytes=page_bytes, block_tokens=block, num_heads=1, num_kv_heads=1, head_dim=head_dim)
    pool = torch.randn(4 * page_bytes // 4).view(torch.uint8).view(4, page_bytes)
    tables = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    q, out = torch.randn(2, head_dim), poisoned(2, head_dim, dtype=torch.float32)
    row = block * head_dim * 4
    if broken == "query":
        q[0] = float("nan")
    else:  # every token of a page of the first sequence, in layer 0
        pool[0, slice(0, row) if broken == "key" else slice(row, 2 * row)] = 255
    sequences, positions = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([6, 6], dtype=torch.int32)

    AttentionScalar(library, layout).launch(0, pool, q, tables, sequences, positions, out)

    assert out[0].isnan().all()
    assert out[1].isfinite().all()
