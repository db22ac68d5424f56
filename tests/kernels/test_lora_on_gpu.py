"""LoRA on the GPU against its fp32 reference: decode, prefill, followers and graphs, named popularity patterns."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from kernels.device_cases import OPS
from kernels.gpu_tensors import DTYPES, TOLERANCE, ints, libraries, poisoned, randn
from kernels.kernel_cases import PATTERNS, AdapterPool, make_adapters, make_geometry, relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.prefill import LoraPrefill
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.pointwise.silu_mul import SiluMul

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
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
        num_heads=SHAPES[shape]["heads"],
        num_kv_heads=SHAPES[shape]["kv_heads"],
        head_dim=SHAPES[shape]["head_dim"],
    )
    pool = pool.clone()
    rope = RopeKv(lib, layout, pool, reference.rotary_table(64, SHAPES[shape]["head_dim"]).cuda())
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
        rows = 30
        adapters = make_adapters(pattern, rows, len(resident.adapters), rng)
        scales = rng.uniform(0.5, 2, rows).astype(np.float32)
        device_scales, built = torch.from_numpy(scales).cuda(), lora.prepare(adapters)
        grid = int(built.counts.max()) // 3 + 1

        width = SHAPES[shape]["inter"]
        x, gate_up = randn(rows, SHAPES[shape]["hidden"], dtype=dtype), randn(rows, 2 * width, dtype=dtype)
        h, out = lora.new_scratch().fill_(float("nan")), poisoned(rows, width, dtype=dtype)
        lora.shrink(0, "gate_up", x, h, grid)
        delta = poisoned(rows, 2 * width, dtype=torch.float32)
        lora.expand_delta(0, "gate_up", h, device_scales, delta, grid)
        SiluMul(lib, width).launch(gate_up, out, delta=delta)
        expected = reference.silu_mul(gate_up + resident.delta(adapters, scales, x, 0, "gate_up"))
        assert relative_error(out, expected) < 2 * TOLERANCE[dtype]

        heads, kv_heads, head_dim = SHAPES[shape]["heads"], SHAPES[shape]["kv_heads"], SHAPES[shape]["head_dim"]
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
            page_bytes=resident.geometry.page_bytes,
            block_tokens=16,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )
        key, value = reference.read_kv(pool, layout, dtype, 0, ints([page]), 16)
        rotated = reference.rope(total[:, heads : heads + kv_heads], rotary, positions)
        assert relative_error(key, rotated[:16]) < 2 * TOLERANCE[dtype]
        assert relative_error(value, total[:16, heads + kv_heads :]) < 2 * TOLERANCE[dtype]


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
