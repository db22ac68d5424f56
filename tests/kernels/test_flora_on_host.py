"""The kernels of FLoRA, run thread by thread on the CPU under sanitizers, and how rows are cut into passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import make_geometry, relative_error
from kernels.part_cases import PartPool
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_common.flora import FLORA, Flora
from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.vectors import BIAS
from loraplex_kernels.lora.flora import LoraFlora, cut_rows
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.tables import AdapterTables, check_parts

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)


class Rig:
    """Adapters in a table: FLoRA of ranks 1, 8 and 3 on everything, of rank 2 on k and down alone, and two of other kinds."""

    def __init__(self, library: HostLibrary) -> None:
        self.library, self.rng = library, np.random.default_rng(0)
        self.geometry = make_geometry(
            dtype=NAMES[library.dtype], hidden=136, inter=2120, heads=2, kv_heads=1, layers=1, page_bytes=16 * 1024
        )
        self.resident = PartPool(self.geometry, 900, self.rng)
        for rank in (1, 8, 3):
            self.resident.add((FLORA,), rank=rank)
        self.resident.add((FLORA,), ("k_proj", "down_proj"), rank=2)
        self.resident.add((BIAS,))
        self.resident.add((LOW_RANK,))
        self.tables = AdapterTables(self.geometry, max_adapters=8, tile_capacity=4096, device=library.device)
        for index, adapter in enumerate(self.resident.adapters):
            self.tables.bind(index, adapter.spec, adapter.pages)
        self.pool, self.shapes = torch.from_numpy(self.resident.pages), op_shapes(self.geometry)
        library.track(self.pool, self.tables.tiles, *self.tables.tensors)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32)).to(self.library.dtype)

    def flora(self, max_passes: int) -> LoraFlora:
        flora = LoraFlora(self.library, self.tables, self.pool, self.shapes, max_rows=16, max_passes=max_passes)
        self.library.track(flora.buffer)
        return flora


@DTYPES
@pytest.mark.parametrize("op", ["qkv", "gate_up", "down"])
@pytest.mark.parametrize("max_passes", [8, 64], ids=["several products", "one product"])
def test_flora_takes_the_place_of_the_bases_product_in_its_rows_and_slices(
    host_library: MakeHostLibrary, dtype: torch.dtype, op: str, max_passes: int
) -> None:
    rig = Rig(host_library(dtype))
    shape = rig.shapes[rig.tables.op_index(0, op)]
    width, adapters = shape.slice_begin[-1], np.array([2, -1, 1, 3, 0, 4, 2, 5, 3], dtype=np.int32)
    x, weight, bias = rig.randn(len(adapters), shape.columns), rig.randn(width, shape.columns), rig.randn(width)
    y, sizes, flora = rig.randn(len(adapters), width), list[int](), rig.flora(max_passes)
    before = y.clone()

    def product(first: int, last: int, scaled: torch.Tensor, out: torch.Tensor) -> None:
        sizes.append(len(scaled))
        out.copy_(scaled.float() @ weight[first:last].float().T)

    flora.prepare(adapters)
    flora.replace(0, op, product, bias, x, y)

    expected = rig.resident.output(adapters, np.ones(len(adapters), np.float32), x, weight, bias, (0, op))
    on_k = slice(*shape.slice_begin[1:3])
    for row, adapter in enumerate(adapters.tolist()):
        replaced = torch.zeros(width, dtype=torch.bool)
        if adapter in (0, 1, 2) or (adapter == 3 and op == "down"):
            replaced[:] = True
        elif adapter == 3 and op == "qkv":
            replaced[on_k] = True
        if replaced.any():
            assert relative_error(y[row, replaced], expected[row, replaced]) < TOLERANCE[dtype], (row, adapter)
        assert torch.equal(y[row, ~replaced], before[row, ~replaced]), "what no adapter replaces stays"
    assert max(sizes) <= max_passes
    assert len(sizes) == len(shape.outputs) * (1 if max_passes == 64 else 3), "W is read once for as many rows as fit"


def test_a_projection_that_no_row_adapts_is_not_multiplied(host_library: MakeHostLibrary) -> None:
    rig = Rig(host_library(torch.float32))
    found, flora = list[tuple[str, int, int]](), rig.flora(64)
    flora.prepare(np.array([-1, 3, 4], dtype=np.int32))

    for op in ("qkv", "gate_up", "down"):
        shape = rig.shapes[rig.tables.op_index(0, op)]

        def product(first: int, last: int, scaled: torch.Tensor, out: torch.Tensor, op: str = op) -> None:
            found.append((op, first, last))
            out.zero_()

        y = torch.zeros(3, shape.slice_begin[-1])
        flora.replace(0, op, product, None, torch.ones(3, shape.columns), y)
    flora.prepare(np.array([-1, 4], dtype=np.int32))
    flora.replace(0, "down", product, None, torch.ones(2, 2120), torch.zeros(2, 136))

    assert found == [("qkv", 128, 192), ("down", 0, 136)]


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(host_library: MakeHostLibrary) -> None:
    rig, found = Rig(host_library(torch.bfloat16)), list[torch.Tensor]()
    x, weight = rig.randn(3, 136), rig.randn(256, 136)
    for adapters in ([0, 1, 2], [-1, 1, -1]):
        y, flora = torch.zeros(3, 256, dtype=torch.bfloat16), rig.flora(8)
        flora.prepare(np.array(adapters, dtype=np.int32))

        def product(first: int, last: int, scaled: torch.Tensor, out: torch.Tensor) -> None:
            for row, each in zip(out, scaled, strict=True):
                row.copy_(weight[first:last].float() @ each.float())

        flora.replace(0, "qkv", product, None, x, y)
        found.append(y[1])

    assert torch.equal(*found)


@given(ranks=st.lists(st.integers(1, 8), max_size=60), max_passes=st.integers(8, 40))
def test_rows_are_cut_into_chunks_whose_passes_follow_each_other(ranks: list[int], max_passes: int) -> None:
    firsts, chunks = cut_rows(np.array(ranks, dtype=np.int32), max_passes)

    assert [row for first, last, _ in chunks for row in range(first, last)] == list(range(len(ranks)))
    for number, (first, last, num_passes) in enumerate(chunks):
        passes = [firsts[row] + rank for row in range(first, last) for rank in range(ranks[row])]
        assert passes == list(range(num_passes))
        assert num_passes <= max_passes
        if number + 1 < len(chunks):
            assert num_passes + ranks[last] > max_passes, "a chunk is as full as its rows allow"


def test_more_rows_than_the_buffer_holds_are_refused(host_library: MakeHostLibrary) -> None:
    flora = Rig(host_library(torch.float32)).flora(64)

    with pytest.raises(ValueError, match="17 rows with FLoRA exceed 16"):
        flora.prepare(np.zeros(17, dtype=np.int32))


def test_flora_beside_a_pair_in_one_module_is_refused_and_beside_one_in_an_op_is_not() -> None:
    pair, flora = LowRank(4, 1.0), Flora(2)

    with pytest.raises(
        ImageError, match=r"layer 1 k_proj: .* does not compute a low-rank pair and FLoRA in one module"
    ):
        check_parts(AdapterSpec("ab" * 32, (ModuleSpec(1, "k_proj", (pair, flora)),)))
    check_parts(AdapterSpec("ab" * 32, (ModuleSpec(1, "q_proj", (pair,)), ModuleSpec(1, "k_proj", (flora,)))))
