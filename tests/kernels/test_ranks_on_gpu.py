"""LoRA of ranks 1 to 256 on every op, all of them in one launch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from kernels.device_cases import OPS
from kernels.gpu_tensors import DTYPES, TOLERANCE, libraries, randn
from kernels.kernel_cases import AdapterPool, make_geometry, relative_error
from loraplex_kernels.items import op_shapes
from loraplex_kernels.lora_decode import LoraDecode
from loraplex_kernels.lora_prefill import LoraPrefill
from loraplex_kernels.tables import AdapterTables

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


@functools.lru_cache(maxsize=1)
def adapters_of_all_ranks(dtype: torch.dtype) -> tuple[AdapterPool, torch.Tensor, AdapterTables]:
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    geometry = make_geometry(
        dtype=name, layers=1, hidden=576, inter=1536, heads=9, kv_heads=3, head_dim=64, page_bytes=1 << 19
    )
    resident = AdapterPool(geometry, 400, np.random.default_rng(13))
    tables = AdapterTables(geometry, max_adapters=len(ALL_RANKS), tile_capacity=1 << 16, device=torch.device("cuda", 0))
    for index, rank in enumerate(ALL_RANKS):
        adapter = resident.add(split_ranks(rank))
        tables.bind(index, adapter.spec, adapter.pages)
    return resident, torch.from_numpy(resident.pages).cuda(), tables


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_from_1_to_256_decode_in_one_launch(dtype: torch.dtype) -> None:
    resident, pool, tables = adapters_of_all_ranks(dtype)
    rng, rows = np.random.default_rng(), len(ALL_RANKS)
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
                assert error < 2 * TOLERANCE[dtype], (op, ALL_RANKS[adapter], lib.arch)


def test_ranks_from_1_to_256_prefill_in_one_launch() -> None:
    dtype = torch.bfloat16
    resident, pool, tables = adapters_of_all_ranks(dtype)
    rng, chunks = np.random.default_rng(), len(ALL_RANKS)
    adapters, counts = rng.permutation(chunks).astype(np.int32), rng.integers(1, 40, chunks).astype(np.int32)
    of_token, ends = np.repeat(adapters, counts).astype(np.int32), np.cumsum(counts)
    scales = rng.uniform(0.5, 2, len(of_token)).astype(np.float32)
    for lib in libraries(dtype):
        shapes = op_shapes(resident.geometry)
        lora = LoraPrefill(lib, tables, pool, shapes, max_items=1 << 16)
        lora.prepare(adapters, counts)
        for op, shape in zip(OPS, shapes, strict=True):
            x = randn(len(of_token), shape.columns, dtype=dtype)
            y = 0.3 * randn(len(of_token), sum(shape.outputs), dtype=dtype)
            expected = y + resident.delta(of_token, scales, x, 0, op)

            lora.apply(0, op, x, torch.from_numpy(scales).cuda(), y)

            for chunk, end in enumerate(ends):
                rows = slice(end - counts[chunk], end)
                error = relative_error(y[rows], expected[rows])
                assert error < 2 * TOLERANCE[dtype], (op, ALL_RANKS[adapters[chunk]], lib.arch)
