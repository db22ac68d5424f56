"""The kernels of e, c, b and sparse deltas, run thread by thread on the CPU under sanitizers, and their items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import make_geometry, relative_error
from kernels.part_cases import PartPool, random_csr
from kernels.part_device_cases import PartRig
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR
from loraplex_kernels import reference
from loraplex_kernels.lora.items import OpShape, op_shapes
from loraplex_kernels.lora.sparse import LoraSparse, rows_at_once
from loraplex_kernels.lora.sparse_items import MIN_NONZEROS, build_sparse
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.lora.vectors import LoraVectors, RowAdapters
from support.decoder_shapes import OPS

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)


class Rig:
    """Adapters of some kinds, each in a table, and rows that name them."""

    def __init__(self, library: HostLibrary, kinds: list[tuple[str, ...]], **options: Any) -> None:
        self.library, self.rng = library, np.random.default_rng(len(kinds))
        self.geometry = make_geometry(
            dtype=NAMES[library.dtype], hidden=136, inter=4168, heads=2, kv_heads=1, layers=1, page_bytes=16 * 1024
        )
        self.resident = PartPool(self.geometry, 900, self.rng)
        for each in kinds:
            self.resident.add(each, **options)
        self.tables = AdapterTables(self.geometry, max_adapters=8, tile_capacity=4096, device=library.device)
        for index, adapter in enumerate(self.resident.adapters):
            self.tables.bind(index, adapter.spec, adapter.pages)
        self.pool = torch.from_numpy(self.resident.pages)
        self.shapes = op_shapes(self.geometry)
        library.track(self.pool, self.tables.tiles, *self.tables.tensors)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32)).to(self.library.dtype)


@DTYPES
@pytest.mark.parametrize("op", ["qkv", "down"])
def test_finish_applies_c_and_b_and_leaves_rows_without_them_as_they_are(
    host_library: MakeHostLibrary, dtype: torch.dtype, op: str
) -> None:
    kinds = [(OUT_VECTOR,), (OUT_VECTOR, BIAS), (BIAS,), (LOW_RANK,)]
    rig = Rig(host_library(dtype), kinds)
    width = rig.shapes[rig.tables.op_index(0, op)].slice_begin[-1]
    y, bias, scales = rig.randn(6, width), rig.randn(width), torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 1.0])
    adapters, before, rows = np.array([2, 1, -1, 0, 3], dtype=np.int32), y.clone(), RowAdapters(8, rig.library.device)
    rows.upload(adapters)

    LoraVectors(rig.library, rig.tables, rig.pool, rig.shapes).finish(0, op, y, rows, scales, bias)

    for row, adapter in enumerate(adapters.tolist()):
        if adapter in (-1, 3):
            assert torch.equal(y[row], before[row])
            continue
        tensors = rig.resident.adapters[adapter].tensors
        c, b = (
            torch.cat([torch.from_numpy(tensors[0, name, kind][0]) for name in OPS[op]])
            if kind in kinds[adapter]
            else None
            for kind in (OUT_VECTOR, BIAS)
        )
        kept = None if adapter % 2 else bias  # every other adapter's c scales the base's bias too
        b = b if b is None else scales[row] * b
        assert relative_error(y[row], reference.finish(before[row : row + 1], c, b, kept)[0]) < TOLERANCE[dtype]
    assert torch.equal(y[5], before[5]), "rows behind the step's have no adapter"


@DTYPES
def test_finish_without_a_base_bias_and_with_a_slice_that_has_no_vector(
    host_library: MakeHostLibrary, dtype: torch.dtype
) -> None:
    rig = Rig(host_library(dtype), [(OUT_VECTOR,)], projections=("k_proj", "up_proj"))
    y, rows = rig.randn(2, 256), RowAdapters(2, rig.library.device)
    before = y.clone()
    rows.upload(np.zeros(2, dtype=np.int32))

    LoraVectors(rig.library, rig.tables, rig.pool, rig.shapes).finish(0, "qkv", y, rows, torch.ones(2))

    c = torch.from_numpy(rig.resident.adapters[0].tensors[0, "k_proj", OUT_VECTOR][0])
    assert relative_error(y[:, 128:192], before[:, 128:192].float() * c) < TOLERANCE[dtype]
    assert torch.equal(y[:, :128], before[:, :128])
    assert torch.equal(y[:, 192:], before[:, 192:])


@DTYPES
def test_finish_and_the_norm_behind_it_are_one_kernel(host_library: MakeHostLibrary, dtype: torch.dtype) -> None:
    library = host_library(dtype)
    rig = PartRig(library, inter=264)
    library.track(rig.pool, rig.tables.tiles, *rig.tables.tensors)

    found, expected = rig.finish_and_norm(torch.Generator().manual_seed(3))

    assert relative_error(found, expected) < TOLERANCE[dtype]


@DTYPES
def test_inputs_are_scaled_where_they_lie_for_rows_with_e_alone(
    host_library: MakeHostLibrary, dtype: torch.dtype
) -> None:
    rig = Rig(host_library(dtype), [(IN_VECTOR,), (OUT_VECTOR,)])
    vectors = LoraVectors(rig.library, rig.tables, rig.pool, rig.shapes)
    x, rows = rig.randn(4, 4168), RowAdapters(4, rig.library.device)
    before = x.clone()
    rows.upload(np.array([0, 1, -1, 0], dtype=np.int32))

    vectors.scale_input(0, "down", x, rows)

    e = torch.from_numpy(rig.resident.adapters[0].tensors[0, "down_proj", IN_VECTOR][0])
    assert relative_error(x[[0, 3]], before[[0, 3]].float() * e) < TOLERANCE[dtype]
    assert torch.equal(x[1:3], before[1:3])


@DTYPES
@pytest.mark.parametrize("op", ["qkv", "gate_up", "down"])
@pytest.mark.parametrize("density", [0.004, 0.05])
def test_sparse_deltas_are_added_for_rows_of_any_adapters(
    host_library: MakeHostLibrary, dtype: torch.dtype, op: str, density: float
) -> None:
    """Rows of one adapter share loads in groups of up to 4; outputs of no and of all columns; tiles in pages anywhere."""
    rig = Rig(host_library(dtype), [(SPARSE_DELTA,), (SPARSE_DELTA,), (BIAS,)], density=density)
    shape = rig.shapes[rig.tables.op_index(0, op)]
    adapters = np.array([0, 1, 0, -1, 0, 2, 0, 0, 0, 1], dtype=np.int32)
    scales = torch.linspace(0.5, 1.5, len(adapters))
    x, y = rig.randn(len(adapters), shape.columns), rig.randn(len(adapters), shape.slice_begin[-1])
    before = y.clone()
    sparse = LoraSparse(rig.library, rig.tables, rig.pool, rig.shapes, max_rows=16, num_sms=1)
    rig.library.track(sparse.buffer)

    sparse.prepare(adapters)
    sparse.add(0, op, x, y, scales)

    zero = torch.zeros(shape.slice_begin[-1], shape.columns)
    expected = rig.resident.output(adapters, scales.numpy(), x, zero, None, (0, op))
    is_sparse = np.isin(adapters, [0, 1])
    assert relative_error(y[is_sparse], before[is_sparse].float() + expected[is_sparse]) < TOLERANCE[dtype]
    assert torch.equal(y[~is_sparse], before[~is_sparse])


COUNTS = {
    "none to all": (0, 1, 7, 8, 9, 400, 16, 0, 0, 3, 15, 17, 133),
    "short": (1, 0, 2, 1, 1, 3, 0, 0, 1),
    "of runs": (8, 16, 0, 24),
    "long": (500, 1, 4100),
    "one at the end": (*(0,) * 63, 5),
}


@DTYPES
@pytest.mark.parametrize("case", COUNTS)
def test_outputs_of_any_number_of_non_zeros_wherever_runs_and_warps_cut_them(
    host_library: MakeHostLibrary, dtype: torch.dtype, case: str
) -> None:
    """Outputs begin and end within a run, on its edge, several in one; ranges of warps and CTAs begin within runs."""
    rig = Rig(host_library(dtype), [(SPARSE_DELTA,)], counts=COUNTS[case])
    shape = rig.shapes[rig.tables.op_index(0, "down")]
    adapters, rows = np.array([0, 0, 0], dtype=np.int32), 3
    x, found = rig.randn(rows, shape.columns), list[torch.Tensor]()
    zero = torch.zeros(shape.slice_begin[-1], shape.columns)
    expected = rig.resident.output(adapters, np.ones(rows, np.float32), x, zero, None, (0, "down"))

    for num_sms in (1, 3):
        y = torch.zeros(rows, shape.slice_begin[-1], dtype=dtype)
        sparse = LoraSparse(rig.library, rig.tables, rig.pool, rig.shapes, max_rows=16, num_sms=num_sms)
        rig.library.track(sparse.buffer)
        sparse.prepare(adapters)
        sparse.add(0, "down", x, y, torch.ones(rows))
        found.append(y)

    assert relative_error(found[0], expected) < TOLERANCE[dtype]
    assert torch.equal(*found), "where work is cut does not change a sum"


def test_a_rows_sum_does_not_depend_on_the_rows_beside_it(host_library: MakeHostLibrary) -> None:
    rig = Rig(host_library(torch.float32), [(SPARSE_DELTA,)], density=0.05)
    x, found = rig.randn(5, 136), list[torch.Tensor]()
    sparse = LoraSparse(rig.library, rig.tables, rig.pool, rig.shapes, max_rows=16, num_sms=2)
    rig.library.track(sparse.buffer)

    for adapters in ([0, 0, 0, 0, 0], [-1, -1, -1, 0, -1]):
        y = torch.zeros(5, 256)
        sparse.prepare(np.array(adapters, dtype=np.int32))
        sparse.add(0, "qkv", x, y, torch.ones(5))
        found.append(y[3])

    assert torch.equal(*found)


SHAPES = (OpShape(columns=512, outputs=(512, 64, 64)), OpShape(columns=1376, outputs=(512,)))


@pytest.mark.parametrize("counts", [[1], [1, 9, 2], [3] * 40])
@pytest.mark.parametrize("grid", [1, 7, 96])
def test_items_cover_every_output_of_every_group_once_in_equal_shares(counts: list[int], grid: int) -> None:
    rng = np.random.default_rng(grid)
    adapters = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    rows = np.arange(len(adapters), dtype=np.int32) * 2 + 1
    nonzeros = rng.integers(0, 60_000, (len(counts), 2, 3)).astype(np.int32)
    nonzeros[:, 1, 1:] = 0

    work = build_sparse(adapters, rows, nonzeros, SHAPES, [4, 2], [grid, grid])

    assert sorted(row for group in work.groups for row in group[4 : 4 + group[1]].tolist()) == rows.tolist()
    for op, shape in enumerate(SHAPES):
        covered = np.zeros((len(work.groups), shape.slice_begin[-1]), dtype=int)
        shares = []
        for first, last in zip(work.ranges[op], work.ranges[op][1:], strict=False):
            share = 0.0
            for group, adapter, begin, extent in work.items[first:last].tolist():
                assert adapter == work.groups[group, 0]
                part = int(np.searchsorted(shape.slice_begin, begin, side="right")) - 1
                assert begin + extent <= shape.slice_begin[part + 1], "an item lies in one slice"
                covered[group, begin : begin + extent] += 1
                passes = -(-int(work.groups[group, 1]) // (4, 2)[op])
                share += extent / shape.outputs[part] * nonzeros[adapter, op, part] * passes
            shares.append(share)
        for part, (begin, end) in enumerate(zip(shape.slice_begin, shape.slice_begin[1:], strict=False)):
            has_delta = nonzeros[work.groups[:, 0], op, part] > 0
            assert (covered[:, begin:end] == has_delta[:, None]).all()
        fair = max(sum(shares) / grid, MIN_NONZEROS)
        assert max(shares) <= fair + 4 * 60_000 / 64, "at most an output or two of rounding on top"


def test_without_sparse_rows_there_are_no_items() -> None:
    none = np.zeros(0, dtype=np.int32)

    work = build_sparse(none, none, np.zeros((1, 2, 3), dtype=np.int32), SHAPES, [4, 2], [5, 5])

    assert len(work.items) == len(work.groups) == 0
    assert all((bounds == 0).all() for bounds in work.ranges)


@pytest.mark.parametrize(("columns", "item_bytes", "rows"), [(4096, 2, 4), (11008, 2, 2), (28672, 2, 1), (28672, 4, 1)])
def test_the_widest_inputs_fit_shared_memory(columns: int, item_bytes: int, rows: int) -> None:
    from loraplex_kernels.lora.sparse import ctas_per_sm, shared_bytes

    assert rows_at_once(columns, item_bytes) == rows
    assert shared_bytes(columns, item_bytes) <= 163 * 1024  # what one CTA may have on sm_80
    assert ctas_per_sm(columns, item_bytes) == (2 if item_bytes == 2 else 1)


def test_the_random_matrices_of_these_tests_have_empty_and_full_outputs() -> None:
    starts = random_csr(40, 64, 0.1, np.random.default_rng(0))[2]

    assert {0, 64} <= set(np.diff(starts).tolist())
