"""Decode LoRA of rows that add several adapters up, run lane by lane on the CPU under sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import AdapterPool, make_geometry, relative_error
from loraplex_kernels.lora.chain_items import Terms, make_terms
from loraplex_kernels.lora.chains import LoraChains, fixed_terms
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.tables import AdapterTables
from support.decoder_shapes import OPS

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
DELTA_OPS: Final = frozenset({"qkv", "gate_up"})
RANKS: Final[tuple[dict[str, int], ...]] = (
    dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 16),
    dict.fromkeys(("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), 8),
    {"k_proj": 24, "v_proj": 5, "gate_proj": 40, "down_proj": 3},
    {"q_proj": 200, "o_proj": 256, "gate_proj": 256, "down_proj": 256},
)
LISTS: Final[tuple[tuple[int, ...], ...]] = (
    (0,),
    (0, 1, 2),
    (),
    (2, 1, 0),
    (0, 1, 2),
    (3, 2, 1, 0),
    (1,),
    *(((0, 1, 2),) * 9),  # more rows of a list than a group holds
    (2,),
)


class Case:
    """Adapters in a pool, plain kernels and those of chains."""

    def __init__(self, library: HostLibrary, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self.rng = np.random.default_rng(3)
        geometry = make_geometry(
            dtype="float32" if dtype == torch.float32 else "bfloat16",
            hidden=200,
            inter=328,
            heads=3,
            kv_heads=1,
            head_dim=64,
            layers=1,
            page_bytes=64 * 1024,
        )
        self.resident = AdapterPool(geometry, 128, self.rng)
        self.tables = tables = AdapterTables(
            geometry, max_adapters=len(RANKS), tile_capacity=1024, device=library.device
        )
        for index, ranks in enumerate(RANKS):
            adapter = self.resident.add({(0, name): rank for name, rank in ranks.items()})
            tables.bind(index, adapter.spec, adapter.pages)
        pool, self.shapes = torch.from_numpy(self.resident.pages), op_shapes(geometry, complete=DELTA_OPS)
        rows = len(LISTS)
        self.chains = LoraChains(library, tables, pool, self.shapes, max_rows=rows, max_terms=fixed_terms(rows))
        self.plain = LoraDecode(library, tables, pool, self.shapes, max_rows=rows, max_items=4096)
        library.track(tables.entries, tables.tiles, pool, self.plain.items.buffer, *self.chains.fixed_tensors)

    def terms(self, lists: tuple[tuple[int, ...], ...], scales: dict[tuple[int, int], float]) -> Terms:
        first = np.array([each[0] if each else -1 for each in lists], dtype=np.int32)
        own = np.array([scales.get((row, 0), 1.0) for row in range(len(lists))], dtype=np.float32)
        more = [(row, each[k], scales[row, k]) for row, each in enumerate(lists) for k in range(1, len(each))]
        rows, adapters = (np.array([entry[i] for entry in more], dtype=np.int32) for i in range(2))
        return make_terms(first, own, rows, adapters, np.array([entry[2] for entry in more], dtype=np.float32))

    def compute(
        self, kernels: LoraDecode, op: str, x: torch.Tensor, scale: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Add the prepared rows' deltas to y, or return the deltas where the op's are complete."""
        h = torch.full(kernels.scratch_shape, float("nan"))
        self.library.track(h)
        kernels.shrink(0, op, x, h, 7)
        if op in DELTA_OPS:
            delta = torch.full(y.shape, float("nan"))
            kernels.expand_delta(0, op, h, scale, delta, 5)
            return delta
        kernels.expand_add(0, op, h, scale, y, 5)
        return y


def random_scales(rng: np.random.Generator, lists: tuple[tuple[int, ...], ...]) -> dict[tuple[int, int], float]:
    return {(row, k): float(rng.uniform(-1, 2)) for row, each in enumerate(lists) for k in range(len(each))}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_launch_adds_every_adapter_of_every_row_up_by_its_weight(
    host_library: MakeHostLibrary, dtype: torch.dtype
) -> None:
    case = Case(host_library(dtype), dtype)
    scales = random_scales(case.rng, LISTS)
    case.chains.prepare_terms(case.terms(LISTS, scales))
    ignored = torch.full((len(LISTS),), float("nan"))
    for op, shape in zip(OPS, case.shapes, strict=True):
        x = torch.randn(len(LISTS), shape.columns).to(dtype)
        y = (0.3 * torch.randn(len(LISTS), shape.slice_begin[-1])).to(dtype)
        expected = torch.zeros(y.shape) if op in DELTA_OPS else y.float().clone()
        for k in range(max(map(len, LISTS))):
            adapters = np.array([each[k] if k < len(each) else -1 for each in LISTS], dtype=np.int32)
            factors = np.array([scales.get((row, k), 0.0) for row in range(len(LISTS))], dtype=np.float32)
            expected += case.resident.delta(adapters, factors, x, 0, op)

        found = case.compute(case.chains, op, x, ignored, y.clone())

        for row, each in enumerate(LISTS):
            assert relative_error(found[row], expected[row]) < TOLERANCE[dtype], (op, row, each)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_row_gets_among_others_the_bits_that_it_gets_alone(host_library: MakeHostLibrary, dtype: torch.dtype) -> None:
    """With one adapter, also those of the kernels that take one adapter a row."""
    case = Case(host_library(dtype), dtype)
    scales = random_scales(case.rng, LISTS)
    op = "down"
    x = torch.randn(len(LISTS), case.shapes[3].columns).to(dtype)
    y = (0.3 * torch.randn(len(LISTS), case.shapes[3].slice_begin[-1])).to(dtype)
    ones = torch.ones(len(LISTS))
    case.chains.prepare_terms(case.terms(LISTS, scales))
    together = case.compute(case.chains, op, x, ones, y.clone())
    for row in (0, 1, 3, 5, 12, 16):
        alone = (LISTS[row],)
        case.chains.prepare_terms(case.terms(alone, {(0, k): scales[row, k] for k in range(len(LISTS[row]))}))

        found = case.compute(case.chains, op, x[row : row + 1].clone(), ones, y[row : row + 1].clone())

        assert torch.equal(found[0], together[row]), LISTS[row]
        if len(LISTS[row]) == 1:
            case.plain.prepare(np.array(LISTS[row], dtype=np.int32))
            factor = torch.tensor([scales[row, 0]], dtype=torch.float32)
            plain = case.compute(case.plain, op, x[row : row + 1].clone(), factor, y[row : row + 1].clone())
            assert torch.equal(plain[0], together[row])


def test_a_step_that_exceeds_fixed_buffers_is_not_prepared_and_larger_ones_are_made_where_they_may(
    host_library: MakeHostLibrary,
) -> None:
    case = Case(host_library(torch.float32), torch.float32)
    lists = ((0, 1, 2),) * 40
    terms = case.terms(lists, random_scales(case.rng, lists))
    tables, pool = case.tables, case.chains._kept[0]
    small = LoraChains(case.library, tables, pool, case.shapes, max_rows=3, max_terms=fixed_terms(3))
    grows = LoraChains(case.library, tables, pool, case.shapes, max_rows=1, max_terms=1, grows=True)

    assert small.prepare_terms(terms) is None
    assert grows.prepare_terms(terms) is not None
    assert grows.scratch_for(len(terms.adapters), grows.new_scratch()).shape[1] == 120
