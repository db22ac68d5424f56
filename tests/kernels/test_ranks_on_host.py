"""Stacked ranks above 256, whose A tiles are narrower than 64 columns: what tiles there are, and decode LoRA on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import AdapterPool, make_geometry, relative_error
from loraplex_common.adapter_image import KIND_A, layout, pair_sizes
from loraplex_kernels.lora.chain_items import Terms
from loraplex_kernels.lora.chains import LoraChains
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.prefill_shape import NARROW_STACKED_RANK, WHOLE_STEPS
from loraplex_kernels.lora.tables import MAX_STACKED_RANK, AdapterTables
from support.decoder_shapes import OPS

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
RANKS: tuple[dict[str, int], ...] = (
    {"q_proj": 16, "v_proj": 16, "o_proj": 16, "gate_proj": 16, "down_proj": 16},
    {"q_proj": 256, "k_proj": 8, "v_proj": 65, "o_proj": 24, "gate_proj": 256, "up_proj": 200},
    {"q_proj": 256, "k_proj": 256, "v_proj": 256, "up_proj": 200, "down_proj": 256},
)


@pytest.mark.parametrize("columns", [24, 200, 576, 4096])
def test_tiles_of_a_hold_whole_steps_or_whole_parts_of_a_step(columns: int) -> None:
    """What prefill reads at once lies in one tile: 64 columns up to a stacked rank of `WHOLE_STEPS`, then 16, then 8."""
    geometry = make_geometry(hidden=columns, layers=1)
    for stacked in (
        *range(1, NARROW_STACKED_RANK + 1),
        *range(NARROW_STACKED_RANK + 1, MAX_STACKED_RANK + 1, 31),
        1536,
    ):
        split = (min(stacked, 512), min(max(stacked - 512, 0), 512), max(stacked - 1024, 0))
        ranks = tuple((0, name, rank) for name, rank in zip(OPS["qkv"], split, strict=True) if rank)
        tiles = layout(geometry, pair_sizes(ranks)).tiles
        step = int(tiles["cols"][tiles["kind"] == KIND_A][0])

        part = 64 if stacked <= WHOLE_STEPS else 16 if stacked <= NARROW_STACKED_RANK else 8
        assert step == columns or step % part == 0


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("page_bytes", [64 * 1024, 1024 * 1024])  # large: no matrix is divided
def test_stacked_ranks_up_to_768_decode_in_one_launch(
    host_library: MakeHostLibrary, dtype: torch.dtype, page_bytes: int
) -> None:
    rng, library = np.random.default_rng(3), host_library(dtype)
    name = "float32" if dtype == torch.float32 else "bfloat16"
    geometry = make_geometry(
        dtype=name, hidden=200, inter=1104, heads=3, kv_heads=1, head_dim=64, layers=1, page_bytes=page_bytes
    )
    resident = AdapterPool(geometry, 2**23 // page_bytes, rng)
    tables = AdapterTables(geometry, max_adapters=3, tile_capacity=1024, device=library.device)
    for index, ranks in enumerate(RANKS):
        adapter = resident.add({(0, projection): rank for projection, rank in ranks.items()})
        tables.bind(index, adapter.spec, adapter.pages)
    pool, shapes = torch.from_numpy(resident.pages), op_shapes(geometry)
    lora = LoraDecode(library, tables, pool, shapes, max_rows=12, max_items=4096)
    adapters = np.array([0, 1, 2, -1, 1, 2, 1, 1, 1, 1, 1, 1], dtype=np.int32)
    scales = rng.uniform(0.5, 2, len(adapters)).astype(np.float32)
    h = lora.new_scratch()
    library.track(tables.entries, tables.tiles, pool, lora.items.buffer, h)
    lora.prepare(adapters)
    for op, shape in zip(OPS, shapes, strict=True):
        x = torch.randn(len(adapters), shape.columns).to(dtype)
        y = (0.3 * torch.randn(len(adapters), sum(shape.outputs))).to(dtype)
        expected = y + resident.delta(adapters, scales, x, 0, op)
        h.fill_(float("nan"))

        lora.shrink(0, op, x, h, 11)
        lora.expand_add(0, op, h, torch.from_numpy(scales), y, 9)

        assert relative_error(y, expected) < TOLERANCE[dtype], op


WIDE_RANKS: dict[torch.dtype, tuple[dict[str, int], ...]] = {
    torch.bfloat16: (
        {"q_proj": 8, "v_proj": 8, "o_proj": 8, "up_proj": 8},
        {"q_proj": 512, "k_proj": 320, "v_proj": 256, "o_proj": 512, "gate_proj": 257, "down_proj": 320},
        {"q_proj": 512, "k_proj": 512, "v_proj": 512, "up_proj": 320, "down_proj": 301},
    ),
    torch.float32: (
        {"q_proj": 8, "v_proj": 8, "o_proj": 8, "up_proj": 8},
        {"q_proj": 512, "k_proj": 320, "o_proj": 512, "gate_proj": 257, "down_proj": 320},  # a tile holds 1,024 stacked
        {"q_proj": 256, "k_proj": 256, "v_proj": 512, "up_proj": 320, "down_proj": 301},
    ),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("page_bytes", [64 * 1024, 1024 * 1024])
def test_ranks_up_to_512_decode_beside_rank_8_in_one_launch(
    host_library: MakeHostLibrary, dtype: torch.dtype, page_bytes: int
) -> None:
    rng, library = np.random.default_rng(4), host_library(dtype)
    name = "float32" if dtype == torch.float32 else "bfloat16"
    geometry = make_geometry(
        dtype=name, hidden=200, inter=328, heads=3, kv_heads=1, head_dim=64, layers=1, page_bytes=page_bytes
    )
    resident = AdapterPool(geometry, 2**24 // page_bytes, rng)
    tables = AdapterTables(geometry, max_adapters=3, tile_capacity=2048, device=library.device)
    for index, ranks in enumerate(WIDE_RANKS[dtype]):
        adapter = resident.add({(0, projection): rank for projection, rank in ranks.items()})
        tables.bind(index, adapter.spec, adapter.pages)
    assert tables.is_wide.tolist() == [False, True, True]
    pool, shapes = torch.from_numpy(resident.pages), op_shapes(geometry)
    lora = LoraChains(library, tables, pool, shapes, max_rows=6, max_terms=9)
    lists = ((0,), (1,), (2,), (0,), (1, 2), (2, 0, 1))  # h of the last two is staged in parts
    places = np.array([row for row, each in enumerate(lists) for _ in each], dtype=np.int32)
    adapters = np.array([index for each in lists for index in each], dtype=np.int32)
    scales, h = rng.uniform(0.5, 2, len(adapters)).astype(np.float32), lora.new_scratch()
    library.track(tables.entries, tables.tiles, pool, *lora.fixed_tensors, h)
    lora.prepare_terms(Terms(places, adapters, scales, len(lists)))
    for op, shape in zip(OPS, shapes, strict=True):
        x = torch.randn(len(lists), shape.columns).to(dtype)
        y = (0.3 * torch.randn(len(lists), sum(shape.outputs))).to(dtype)
        expected = y.float().clone()
        of_term = resident.delta(adapters, scales, x[torch.from_numpy(places).long()], 0, op)
        expected.index_add_(0, torch.from_numpy(places).long(), of_term)
        h.fill_(float("nan"))

        lora.shrink(0, op, x, h, 11)
        lora.expand_add(0, op, h, torch.ones(len(lists)), y, 9)

        for row, each in enumerate(lists):
            assert relative_error(y[row], expected[row]) < 2 * TOLERANCE[dtype], (op, each)
