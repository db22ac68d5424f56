"""Every kernel on the GPU against its fp32 reference: fresh random inputs, poisoned outputs, named popularity patterns."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from kernels.device_cases import OPS, run_all
from kernels.gpu_tensors import ATTENTION_TOLERANCE, DTYPES, TOLERANCE, ints, libraries, library, poisoned, randn
from kernels.kernel_cases import PATTERNS, AdapterPool, make_adapters, make_geometry, relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention_decode import AttentionDecode
from loraplex_kernels.attention_prefill import AttentionPrefill, make_tiles
from loraplex_kernels.attention_scalar import AttentionScalar
from loraplex_kernels.compiler import SOURCES
from loraplex_kernels.embedding import Embedding
from loraplex_kernels.items import op_shapes
from loraplex_kernels.lora_decode import LoraDecode
from loraplex_kernels.lora_prefill import LoraPrefill
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.paged_kv import KvLayout
from loraplex_kernels.rms_norm import RmsNorm
from loraplex_kernels.rope_kv import RopeKv
from loraplex_kernels.silu_mul import SiluMul
from loraplex_kernels.tables import AdapterTables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def test_every_kernel_computes_as_sm_80_code() -> None:
    loaded: set[str] = set()

    class RecordingLibrary(KernelLibrary):
        def load(self, name: str, *arguments: Any, **fields: Any) -> Any:
            loaded.add(name)
            return super().load(name, *arguments, **fields)

    failures = run_all(lambda dtype: RecordingLibrary(torch.device("cuda", 0), dtype, arch="compute_80"))

    assert not failures
    assert loaded == {path.stem for path in SOURCES.glob("*.cu")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 576, 2048, 4096, 5120, 8192])
def test_rms_norm(dtype: torch.dtype, hidden: int) -> None:
    for lib in libraries(dtype):
        x, residual, weight = randn(33, hidden, dtype=dtype), randn(33, hidden, dtype=dtype), randn(hidden, dtype=dtype)
        out, expected = poisoned(33, hidden, dtype=dtype), reference.rms_norm(x, weight, 1e-5, residual)
        total = x + residual

        RmsNorm(lib, hidden, 1e-5).launch(x, weight, out, residual=residual)

        assert relative_error(out, expected) < TOLERANCE[dtype]
        assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1536, 11008, 14336])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    for lib in libraries(dtype):
        gate_up, out = randn(70, 2 * width, dtype=dtype), poisoned(70, width, dtype=dtype)

        SiluMul(lib, width).launch(gate_up, out)

        assert relative_error(out, reference.silu_mul(gate_up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [576, 8192])
def test_embedding(dtype: torch.dtype, hidden: int) -> None:
    table = randn(100, hidden, dtype=dtype)
    for lib in libraries(dtype):
        out = poisoned(4, hidden, dtype=dtype)

        Embedding(lib, hidden).launch(table, ints([3, -1, 99, 100]), ints([0, 2, 1, 0]), ints([7, 8, 6]), out)

        assert torch.equal(out[:3], table[[3, 6, 99]])
        assert not out[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "has_norm"),
    [(9, 3, 64, False), (16, 16, 64, True), (32, 8, 128, True), (32, 32, 128, False)],
)
def test_rope_kv(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, has_norm: bool) -> None:
    layers, block, tokens = 2, 16, 37
    page_bytes = layers * 2 * kv_heads * block * head_dim * dtype.itemsize
    layout = KvLayout(
        page_bytes=page_bytes, block_tokens=block, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    for lib in libraries(dtype):
        pool = torch.zeros(5, page_bytes, dtype=torch.uint8, device="cuda")
        rotary = reference.rotary_table(512, head_dim).cuda()
        qkv = randn(tokens, layout.qkv_width, dtype=dtype)
        before = qkv.clone().view(tokens, -1, head_dim)
        slots = torch.randperm(5 * block, device="cuda")[:tokens].int()
        positions = torch.randint(0, 512, (tokens,), device="cuda").int()
        norms = [randn(head_dim, dtype=dtype) for _ in range(2)] if has_norm else [None, None]

        RopeKv(lib, layout, pool, rotary).launch(1, qkv, positions, slots, q_norm=norms[0], k_norm=norms[1])

        q, key, value = torch.split(before, [heads, kv_heads, kv_heads], dim=1)
        if norms[0] is not None and norms[1] is not None:
            q, key = reference.rms_norm(q, norms[0], 1e-6), reference.rms_norm(key, norms[1], 1e-6)
        got_key, got_value = reference.read_kv(pool, layout, dtype, 1, torch.arange(5, device="cuda"), 5 * block)
        got_q = qkv.view(tokens, -1, head_dim)[:, :heads]
        assert relative_error(got_q, reference.rope(q, rotary, positions)) < TOLERANCE[dtype]
        assert relative_error(got_key[slots.long()], reference.rope(key, rotary, positions)) < TOLERANCE[dtype]
        assert torch.equal(got_value[slots.long()], value)


SHAPES = {
    "smol": {"hidden": 576, "inter": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "page_bytes": 1 << 19},
    "llama3": {"hidden": 4096, "inter": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "page_bytes": 1 << 21},
    "tiny_llama": {"hidden": 2048, "inter": 5632, "heads": 32, "kv_heads": 4, "head_dim": 64, "page_bytes": 1 << 20},
    "llama2_13b": {"hidden": 5120, "inter": 13824, "heads": 40, "kv_heads": 40, "head_dim": 128, "page_bytes": 1 << 21},
    "wide": {"hidden": 8192, "inter": 1024, "heads": 64, "kv_heads": 8, "head_dim": 128, "page_bytes": 1 << 21},
}
RANKS = {
    "smol": {torch.bfloat16: (1, 3, 8, 12, 16, 17, 64), torch.float32: (1, 8, 16, 33)},
    "llama3": {torch.bfloat16: (8, 16, 32, 64), torch.float32: (8, 16)},
    "tiny_llama": {torch.bfloat16: (2, 16, 85), torch.float32: (4, 24)},
    "llama2_13b": {torch.bfloat16: (8, 40), torch.float32: (8,)},
    "wide": {torch.bfloat16: (16, 80), torch.float32: (16,)},
}


@functools.lru_cache(maxsize=2)
def resident_adapters(
    shape: str, dtype: torch.dtype, layers: int = 1
) -> tuple[AdapterPool, torch.Tensor, AdapterTables]:
    rng = np.random.default_rng(11)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    geometry = make_geometry(dtype=name, layers=layers, **SHAPES[shape])
    resident = AdapterPool(geometry, 160, rng)
    for rank in RANKS[shape][dtype]:
        resident.add_uniform(rank)
    resident.add(
        {
            (0, "q_proj"): 5,
            (0, "v_proj"): 24,
            (0, "down_proj"): 128 if dtype == torch.float32 else 256,
            (0, "up_proj"): 16,
        }
    )
    tables = AdapterTables(geometry, max_adapters=16, tile_capacity=1 << 14, device=torch.device("cuda", 0))
    for index, adapter in enumerate(resident.adapters):
        tables.bind(index, adapter.spec, adapter.pages)
    return resident, torch.from_numpy(resident.pages).cuda(), tables


def make_lora(shape: str, lib: KernelLibrary) -> tuple[LoraDecode, AdapterPool, torch.Tensor, RopeKv]:
    resident, pool, tables = resident_adapters(shape, lib.dtype)
    geometry = resident.geometry
    layout = KvLayout(
        page_bytes=geometry.page_bytes,
        block_tokens=16,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
    )
    pool = pool.clone()
    rope = RopeKv(lib, layout, pool, reference.rotary_table(64, geometry.head_dim).cuda())
    lora = LoraDecode(lib, tables, pool, op_shapes(geometry, complete=frozenset(OPS)), max_rows=64, max_items=1 << 16)
    return lora, resident, pool, rope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_lora_decode_adds_what_each_rows_adapter_adds(shape: str, pattern: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng()
    for lib in libraries(dtype):
        lora, resident, _, _ = make_lora(shape, lib)
        rows = int(rng.integers(1, 50))
        adapters = make_adapters(pattern, rows, len(resident.adapters), rng)
        scales = rng.uniform(0.5, 2, rows).astype(np.float32)
        built = lora.prepare(adapters)
        for op, op_shape in zip(OPS, lora.builder.shapes, strict=True):
            x, y = randn(rows, op_shape.columns, dtype=dtype), 0.3 * randn(rows, sum(op_shape.outputs), dtype=dtype)
            h, delta = lora.new_scratch().fill_(float("nan")), resident.delta(adapters, scales, x, 0, op)
            expected, written = y + delta, poisoned(*y.shape, dtype=dtype)

            lora.shrink(0, op, x, h, max(1, int(built.counts.max()) // 2))
            lora.expand_add(0, op, h, torch.from_numpy(scales).cuda(), y, max(1, int(built.counts.max())))
            lora.expand_delta(0, op, h, torch.from_numpy(scales).cuda(), written, int(built.counts.max()))

            assert relative_error(y, expected) < TOLERANCE[dtype], (op, rows, lib.arch, lib.dependent)
            assert relative_error(written, delta) < TOLERANCE[dtype], (op, rows, lib.arch, lib.dependent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", ["smol", "llama3", "llama2_13b"])
def test_followers_add_the_delta_of_adapted_rows(shape: str, pattern: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng()
    for lib in libraries(dtype):
        lora, resident, pool, rope = make_lora(shape, lib)
        geometry, rows = resident.geometry, 30
        adapters = make_adapters(pattern, rows, len(resident.adapters), rng)
        scales = rng.uniform(0.5, 2, rows).astype(np.float32)
        device_scales, built = torch.from_numpy(scales).cuda(), lora.prepare(adapters)
        grid = int(built.counts.max()) // 3 + 1

        width = geometry.intermediate_size
        x, gate_up = randn(rows, geometry.hidden_size, dtype=dtype), randn(rows, 2 * width, dtype=dtype)
        h, out = lora.new_scratch().fill_(float("nan")), poisoned(rows, width, dtype=dtype)
        lora.shrink(0, "gate_up", x, h, grid)
        delta = poisoned(rows, 2 * width, dtype=torch.float32)
        lora.expand_delta(0, "gate_up", h, device_scales, delta, grid)
        SiluMul(lib, width).launch(gate_up, out, delta=delta)
        expected = reference.silu_mul(gate_up + resident.delta(adapters, scales, x, 0, "gate_up"))
        assert relative_error(out, expected) < 2 * TOLERANCE[dtype]

        heads, kv_heads, head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        qkv = randn(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        total = (qkv + resident.delta(adapters, scales, x, 0, "qkv")).view(rows, -1, head_dim)
        page = int(resident._free[-1])
        positions, slots = ints(rng.integers(0, 64, rows)), page * 16 + ints(np.arange(rows) % 16)
        slots[16:] = -1
        lora.shrink(0, "qkv", x, h.fill_(float("nan")), grid)
        delta = poisoned(rows, qkv.shape[1], dtype=torch.float32)
        lora.expand_delta(0, "qkv", h, device_scales, delta, grid)
        rope.launch(0, qkv, positions, slots, delta=delta)
        rotary = reference.rotary_table(64, head_dim).cuda()
        got = qkv.view(rows, -1, head_dim)[:, :heads]
        assert relative_error(got, reference.rope(total[:, :heads], rotary, positions)) < 2 * TOLERANCE[dtype]
        layout = KvLayout(
            page_bytes=geometry.page_bytes, block_tokens=16, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
        )
        key, value = reference.read_kv(pool, layout, dtype, 0, ints([page]), 16)
        rotated = reference.rope(total[:, heads : heads + kv_heads], rotary, positions)
        assert relative_error(key, rotated[:16]) < 2 * TOLERANCE[dtype]
        assert relative_error(value, total[:16, heads + kv_heads :]) < 2 * TOLERANCE[dtype]


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
        kernel = AttentionDecode(lib, layout, max_rows=32, max_context=2048)
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
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), ATTENTION_SHAPES[:4])
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


def test_a_graph_replays_lora_with_new_items_and_dependent_launch() -> None:
    """One capture serves any mix of adapters: tables, items and scratch are fixed buffers."""
    lib, rng = libraries(torch.bfloat16)[-2], np.random.default_rng()
    lora, resident, _, _ = make_lora("llama3", lib)
    x, y, h = randn(32, 4096, dtype=torch.bfloat16), randn(32, 6144, dtype=torch.bfloat16), lora.new_scratch()
    scale, base = torch.ones(32, device="cuda"), y.clone()
    lora.prepare(np.zeros(32, dtype=np.int32))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_(base)
        lora.shrink(0, "qkv", x, h, 300)
        lora.expand_add(0, "qkv", h, scale, y, 300)
    for pattern in PATTERNS:
        adapters = make_adapters(pattern, 32, len(resident.adapters), rng)
        x.copy_(randn(32, 4096, dtype=torch.bfloat16))
        h.fill_(float("nan"))
        lora.prepare(adapters)

        graph.replay()

        expected = base + resident.delta(adapters, np.ones(32, dtype=np.float32), x, 0, "qkv")
        assert relative_error(y, expected) < TOLERANCE[torch.bfloat16], pattern


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


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_lora_prefill_adds_what_each_chunks_adapter_adds(shape: str, pattern: str) -> None:
    rng, dtype = np.random.default_rng(), torch.bfloat16
    for lib in libraries(dtype):
        resident, pool, tables = resident_adapters(shape, dtype)
        lora = LoraPrefill(lib, tables, pool, op_shapes(resident.geometry), max_items=1 << 16)
        chosen = make_adapters(pattern, 12, len(resident.adapters), rng)
        adapters = np.concatenate([[0, 0, -1], chosen]).astype(np.int32)
        counts = rng.integers(1, 150, len(adapters)).astype(np.int32)
        tokens = 2 + int(counts.sum())
        of_token = np.concatenate([[-1, -1], np.repeat(adapters, counts)]).astype(np.int32)
        scales = rng.uniform(0.5, 2, tokens).astype(np.float32)
        lora.prepare(adapters, counts, 2)
        for op, op_shape in zip(("qkv", "o", "gate_up", "down"), op_shapes(resident.geometry), strict=True):
            x, y = randn(tokens, op_shape.columns, dtype=dtype), 0.3 * randn(tokens, sum(op_shape.outputs), dtype=dtype)
            before, expected = y.clone(), y + resident.delta(of_token, scales, x, 0, op)

            lora.apply(0, op, x, torch.from_numpy(scales).cuda(), y)

            assert relative_error(y, expected) < TOLERANCE[dtype], (op, lib.arch)
            assert torch.equal(y[of_token < 0], before[of_token < 0]), "rows without an adapter changed"
