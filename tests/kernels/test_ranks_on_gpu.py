"""LoRA of ranks 1 to 512 of a projection and up to 1,536 stacked on every op, all of them in one launch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from kernels.device_cases import OPS
from kernels.gpu_tensors import DTYPES, TOLERANCE, libraries, randn
from kernels.kernel_cases import AdapterPool, make_geometry, relative_error
from loraplex_kernels.lora.chain_items import Terms
from loraplex_kernels.lora.chains import LoraChains
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.prefill import LoraPrefill
from loraplex_kernels.lora.prefill_cut import RESIDENCIES
from loraplex_kernels.lora.tables import AdapterTables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
ALL_RANKS = (*range(1, 34), *range(40, 256, 8), 63, 65, 85, 127, 129, 191, 255, 256)


def split_ranks(stacked: int) -> dict[tuple[int, str], int]:
    """Spread a rank over the projections of every op, so that each op's ranks together are it."""
    parts = {
        "q_proj": stacked - stacked // 2 - stacked // 5,
        "k_proj": stacked // 5,
        "v_proj": stacked // 2,
        "o_proj": stacked,
        "gate_proj": stacked - stacked // 3,
        "up_proj": stacked // 3,
        "down_proj": stacked,
    }
    return {(0, name): rank for name, rank in parts.items() if rank}


def stack_ranks(q: int, k: int, v: int, gate: int, up: int) -> dict[tuple[int, str], int]:
    """Name ranks that are stacked beyond 256, and those of the ops of one projection."""
    ranks = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": q, "gate_proj": gate, "up_proj": up, "down_proj": gate}
    return {(0, name): rank for name, rank in ranks.items() if rank}


STACKED_RANKS = (
    stack_ranks(256, 256, 256, 256, 256),
    stack_ranks(256, 8, 64, 256, 200),
    stack_ranks(86, 86, 85, 129, 128),  # 257: the first that have tiles of less than 64 columns
    stack_ranks(100, 100, 100, 255, 7),
    stack_ranks(171, 171, 170, 0, 256),  # 512: the last that have tiles of 32 columns in bf16
    stack_ranks(171, 171, 171, 16, 16),  # 513: the first that have tiles of 16
    stack_ranks(256, 0, 255, 8, 256),
    stack_ranks(16, 16, 16, 16, 16),  # wide tiles in the same launch
)
WIDE_RANKS = (
    stack_ranks(512, 512, 512, 512, 512),
    stack_ranks(320, 0, 8, 257, 512),
    stack_ranks(8, 8, 8, 8, 8),
    stack_ranks(300, 321, 0, 511, 1),  # rows of B that no copy can take
    stack_ranks(256, 256, 256, 256, 256),
    stack_ranks(344, 344, 344, 504, 512),
)
FP32_WIDE_RANKS = (stack_ranks(512, 256, 256, 512, 512), stack_ranks(320, 0, 8, 257, 300), *WIDE_RANKS[2:5])
WIDE = {f"wide, hidden {hidden}": hidden for hidden in (576, 1024)}
SETS = {
    "ranks 1 to 256, hidden 576": (576, [split_ranks(rank) for rank in ALL_RANKS]),
    **{f"stacked, hidden {hidden}": (hidden, list(STACKED_RANKS)) for hidden in (576, 2048, 4096)},
}


def wide_ranks(dtype: torch.dtype) -> list[dict[tuple[int, str], int]]:
    """In fp32 a tile holds a stacked rank of 1,024."""
    return list(WIDE_RANKS if dtype == torch.bfloat16 else FP32_WIDE_RANKS)


@functools.lru_cache(maxsize=1)
def resident_adapters(name: str, dtype: torch.dtype) -> tuple[AdapterPool, torch.Tensor, AdapterTables]:
    hidden, adapters = SETS[name] if name in SETS else (WIDE[name], wide_ranks(dtype))
    geometry = make_geometry(
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        layers=1,
        hidden=hidden,
        inter=hidden * 8 // 3 // 64 * 64,
        heads=hidden // 64,
        kv_heads=hidden // 64 // (3 if hidden == 576 else 4),
        head_dim=64,
        page_bytes=1 << 19,
    )
    resident = AdapterPool(geometry, 700, np.random.default_rng(13))
    tables = AdapterTables(geometry, max_adapters=len(adapters), tile_capacity=1 << 16, device=torch.device("cuda", 0))
    for index, ranks in enumerate(adapters):
        adapter = resident.add(ranks)
        tables.bind(index, adapter.spec, adapter.pages)
    return resident, torch.from_numpy(resident.pages).cuda(), tables


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SETS))
def test_adapters_of_all_ranks_decode_in_one_launch(name: str, dtype: torch.dtype) -> None:
    resident, pool, tables = resident_adapters(name, dtype)
    rng, rows = np.random.default_rng(), len(resident.adapters)
    adapters, scales = rng.permutation(rows).astype(np.int32), rng.uniform(0.5, 2, rows).astype(np.float32)
    for lib in libraries(dtype):
        shapes = op_shapes(resident.geometry)
        lora = LoraDecode(lib, tables, pool, shapes, max_rows=128, max_items=1 << 16)
        grid = int(lora.prepare(adapters).counts.max())
        for op, shape in zip(OPS, shapes, strict=True):
            x, y = randn(rows, shape.columns, dtype=dtype), 0.3 * randn(rows, sum(shape.outputs), dtype=dtype)
            h, expected = lora.new_scratch().fill_(float("nan")), y + resident.delta(adapters, scales, x, 0, op)

            lora.shrink(0, op, x, h, grid)
            lora.expand_add(0, op, h, torch.from_numpy(scales).cuda(), y, grid)

            for row, adapter in enumerate(adapters):  # row by row: one wrong rank in a hundred must show
                error = relative_error(y[row], expected[row])
                assert error < 2 * TOLERANCE[dtype], (op, SETS[name][1][adapter], lib.arch)


@pytest.mark.parametrize("residencies", [(3,), (2,), RESIDENCIES])
@pytest.mark.parametrize("clusters", [(), (8,), (4,), (2,)])  # by the size of the step, or always the same
@pytest.mark.parametrize("name", list(SETS))
def test_adapters_of_all_ranks_prefill_in_one_launch(
    name: str, clusters: tuple[int, ...], residencies: tuple[int, ...]
) -> None:
    dtype = torch.bfloat16
    resident, pool, tables = resident_adapters(name, dtype)
    rng, chunks = np.random.default_rng(), len(resident.adapters)
    adapters, counts = rng.permutation(chunks).astype(np.int32), rng.integers(1, 90, chunks).astype(np.int32)
    of_token, ends = np.repeat(adapters, counts).astype(np.int32), np.cumsum(counts)
    scales = rng.uniform(0.5, 2, len(of_token)).astype(np.float32)
    for lib in libraries(dtype):
        shapes = op_shapes(resident.geometry)
        chosen = () if lib.arch == "compute_80" else clusters
        lora = LoraPrefill(lib, tables, pool, shapes, max_items=1 << 16, clusters=chosen, residencies=residencies)
        lora.prepare(adapters, counts)
        for op, shape in zip(OPS, shapes, strict=True):
            x = randn(len(of_token), shape.columns, dtype=dtype)
            y = 0.3 * randn(len(of_token), sum(shape.outputs), dtype=dtype)
            expected = y + resident.delta(of_token, scales, x, 0, op)

            lora.apply(0, op, x, torch.from_numpy(scales).cuda(), y)

            for chunk, end in enumerate(ends):
                rows = slice(end - counts[chunk], end)
                error = relative_error(y[rows], expected[rows])
                assert error < 2 * TOLERANCE[dtype], (op, resident.adapters[adapters[chunk]].spec.sizes, lib.arch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*WIDE, *SETS])
def test_adapters_of_all_ranks_are_added_up_in_one_launch(name: str, dtype: torch.dtype) -> None:
    """Each row has an adapter and the one behind it."""
    resident, pool, tables = resident_adapters(name, dtype)
    rng, rows = np.random.default_rng(), len(resident.adapters)
    first = rng.permutation(rows).astype(np.int32)
    lists = np.stack([first, (first + 1) % rows], axis=1)
    scales = rng.uniform(0.5, 2, lists.shape).astype(np.float32)
    terms = Terms(np.repeat(np.arange(rows, dtype=np.int32), 2), lists.reshape(-1), scales.reshape(-1), rows)
    for lib in libraries(dtype):
        shapes = op_shapes(resident.geometry)
        lora = LoraChains(lib, tables, pool, shapes, max_rows=1, max_terms=2 * rows, grows=True)
        built = lora.prepare_terms(terms)
        assert built is not None
        grid = int(built.counts.max())
        for op, shape in zip(OPS, shapes, strict=True):
            x, y = randn(rows, shape.columns, dtype=dtype), 0.3 * randn(rows, sum(shape.outputs), dtype=dtype)
            h, expected = lora.new_scratch().fill_(float("nan")), y.float()
            for place in range(2):
                expected = expected + resident.delta(lists[:, place], scales[:, place], x, 0, op)

            lora.shrink(0, op, x, h, grid)
            lora.expand_add(0, op, h, torch.ones(rows, device="cuda"), y, grid)

            for row, each in enumerate(lists.tolist()):
                assert relative_error(y[row], expected[row]) < 2 * TOLERANCE[dtype], (op, each, lib.arch)


@pytest.mark.parametrize("clusters", [(), (8,), (4,), (2,)])
@pytest.mark.parametrize("name", list(WIDE))
def test_wide_adapters_prefill_in_two_launches(name: str, clusters: tuple[int, ...]) -> None:
    test_adapters_of_all_ranks_prefill_in_one_launch(name, clusters, RESIDENCIES)
