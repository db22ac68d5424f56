"""The device tables take ops and kinds of parts as geometry and registry list them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.kernel_cases import AdapterPool
from kernels.part_cases import PartPool
from loraplex_common.adapter_image import ITEM_BYTES, LOW_RANK, AdapterSpec, Geometry, ImageError, ModuleSpec, pack
from loraplex_common.adapter_parts import KINDS
from loraplex_common.low_rank import LowRank
from loraplex_common.projections import Projection
from loraplex_common.sparse_delta import SPARSE_DELTA, SparseDelta
from loraplex_common.vectors import BIAS, Bias, InVector
from loraplex_common.vectors import OUT_VECTOR as SCALES
from loraplex_kernels.lora.items import HEADER_STEP, ItemBuilder, header_ints, op_shapes, range_index
from loraplex_kernels.lora.tables import AdapterTables, OpLimitError, check_parts, make_entries
from support.decoder_shapes import decoder_geometry
from support.part_kinds import OUT_VECTOR, OutVector, OutVectorKind

CPU = torch.device("cpu")
LAYERS = tuple(
    (
        Projection("a.in_proj", f"in{layer // 2}", 64 * (1 + layer // 2), 128),
        Projection("a.out_proj", "out", 128, 64 * (1 + layer % 2)),
    )
    for layer in range(16)
)
"""Eight different ops named in0 to in7, and two of one name."""


def test_every_op_of_layers_that_differ_has_a_shape_a_range_and_entries() -> None:
    geometry = Geometry.of(LAYERS, dtype="float32", page_bytes=64 * 1024)
    shapes = op_shapes(geometry)
    tables = AdapterTables(geometry, max_adapters=2, tile_capacity=256, device=CPU)

    assert len(shapes) == 10
    assert header_ints(4) == header_ints(8) == HEADER_STEP
    assert header_ints(10) == 2 * HEADER_STEP
    assert shapes[tables.op_index(0, "out")].outputs == (64,)
    assert shapes[tables.op_index(1, "out")].outputs == (128,)
    assert tables.entry_address(15, 9) == tables.entries[0, 15, 9].data_ptr()

    built = ItemBuilder(shapes, 4).build(
        np.zeros(3, np.int32), np.full((1, 10, 3), 4, np.int32), np.full((1, 10), 4, np.int32)
    )
    last = built.buffer[2 * range_index(9, expand=True) :][:2]
    assert last.tolist() == [built.counts[:-1].sum(), built.counts[-1]]
    assert len(built.buffer) == header_ints(10) + 12 * built.num_groups + 4 * built.counts.sum()


def test_an_adapter_fills_the_entries_of_the_ops_that_its_layers_have() -> None:
    geometry = Geometry.of(LAYERS, dtype="float32", page_bytes=64 * 1024)
    pool = AdapterPool(geometry, 16, np.random.default_rng(0))
    adapter = pool.add({(3, "in_proj"): 5, (3, "out_proj"): 7})

    entries, _ = make_entries(geometry, adapter.spec, adapter.pages)

    filled = {(int(layer), geometry.ops[op].name) for layer, op in np.argwhere(entries[LOW_RANK]["stacked_rank"])}
    assert filled == {(3, "in1"), (3, "out")}
    assert geometry.ops[geometry.op_indices(3)["out"]].projections[0].out_features == 128


def test_an_op_of_more_slices_than_the_kernels_take_is_refused_with_the_remedy() -> None:
    layer = tuple(Projection(f"mix.{name}_proj", "four", 64, 64) for name in "abcd")
    geometry = Geometry.of([layer], dtype="float32", page_bytes=4096)

    with pytest.raises(OpLimitError, match=r"op four fuses 4 projections .* take 3 of one op: use --backend torch"):
        AdapterTables(geometry, max_adapters=1, tile_capacity=1, device=CPU)


def test_a_further_kind_of_part_gets_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, OUT_VECTOR, OutVectorKind())
    monkeypatch.setattr("loraplex_kernels.lora.tables.COMPUTED_KINDS", (LOW_RANK, OUT_VECTOR))
    geometry = decoder_geometry(
        dtype="float32",
        page_bytes=16 * 1024,
        num_layers=2,
        hidden_size=64,
        intermediate_size=8192,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
    )
    spec = AdapterSpec(
        "ab" * 32,
        (
            ModuleSpec(0, "v_proj", (LowRank(8, 2.0), OutVector(3.0))),
            ModuleSpec(1, "up_proj", (OutVector(5.0),)),
        ),
    )
    rng = np.random.default_rng(1)
    tensors = {
        (layer, name, kind): tuple(
            rng.standard_normal(shape, dtype=np.float32)
            for shape in KINDS[kind].shapes(geometry.projection(layer, name), size).values()
        )
        for layer, name, kind, size in spec.sizes
    }
    image = pack(geometry, spec, tensors)
    pages = np.arange(len(image), dtype=np.int32)[::-1].copy()
    tables = AdapterTables(geometry, max_adapters=3, tile_capacity=64, device=CPU)

    tables.bind(0, spec, pages)
    tables.bind(2, spec, pages)

    kind, pool = KINDS[OUT_VECTOR], np.empty(image.size, np.uint8)
    pool.reshape(image.shape)[pages] = image
    entries = tables.entries_of(OUT_VECTOR)[2].numpy().view(kind.table_dtype)[..., 0]
    tiles, item = tables.tiles.numpy(), ITEM_BYTES["float32"]
    for layer, name in ((0, "v_proj"), (1, "up_proj")):
        op, part = geometry.place(layer, name)
        entry, expected = entries[layer, op], tensors[layer, name, OUT_VECTOR][0]
        step = int(entry["step"][part])
        starts = range(0, len(expected), step)
        offsets = [int(tiles[entry["first"][part] + number]) for number in range(len(starts))]
        found = [
            pool[offset : offset + item * min(step, len(expected) - start)].view(np.float32)
            for start, offset in zip(starts, offsets, strict=True)
        ]
        np.testing.assert_array_equal(np.concatenate(found), expected)
    assert entries[0, geometry.op_indices(0)["qkv"]]["strength"].tolist() == [0, 0, 3.0]
    assert entries[1, geometry.op_indices(1)["gate_up"]]["strength"].tolist() == [0, 5.0, 0]
    assert entries[1, geometry.op_indices(1)["gate_up"]]["offset"][1] == -1, "pages in reverse divide the vector"
    assert tables.max_ranks[2].max() == 8


def test_a_part_that_no_kernel_computes_is_refused_by_name() -> None:
    spec = AdapterSpec("ab" * 32, (ModuleSpec(0, "v_proj", (OutVector(3.0),)),))

    with pytest.raises(ImageError, match="layer 0 v_proj: backend cuda does not compute parts of kind 'test_vector'"):
        check_parts(spec)


def small_geometry() -> Geometry:
    return decoder_geometry(
        dtype="float32",
        page_bytes=16 * 1024,
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
    )


def test_binding_plain_lora_touches_no_table_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = small_geometry()
    adapter = AdapterPool(geometry, 16, np.random.default_rng(0)).add_uniform(8)
    tables = AdapterTables(geometry, max_adapters=1, tile_capacity=256, device=CPU)
    sent: list[int] = []
    monkeypatch.setattr(tables, "_upload", lambda target, source: sent.append(target.data_ptr()))

    tables.bind(0, adapter.spec, adapter.pages)

    assert sent == [tables.tiles.data_ptr(), tables.entries[0].data_ptr()]
    assert not tables.has_others[0]


def test_an_index_forgets_the_parts_of_the_adapter_that_it_named_before() -> None:
    geometry = small_geometry()
    pairs, others = (
        AdapterPool(geometry, 64, np.random.default_rng(0)),
        PartPool(geometry, 64, np.random.default_rng(1)),
    )
    plain, rich = pairs.add_uniform(8), others.add((SCALES, BIAS, SPARSE_DELTA), ("q_proj", "down_proj"))
    tables = AdapterTables(geometry, max_adapters=2, tile_capacity=1024, device=CPU)
    tables.bind(1, rich.spec, rich.pages)
    qkv, gate_up = geometry.op_indices(0)["qkv"], geometry.op_indices(0)["gate_up"]
    assert tables.has_others.tolist() == [False, True]
    assert tables.has_part[BIAS][1, [qkv, gate_up]].tolist() == [True, False]
    assert (tables.max_nonzeros[1, qkv] > 0).tolist() == [True, False, False]
    assert tables.max_stacked[1].max() == 0

    tables.unbind(1)
    assert not tables.max_nonzeros.any()
    tables.bind(1, plain.spec, plain.pages)

    for kind in (SCALES, BIAS, SPARSE_DELTA):
        assert not tables.entries_of(kind).any()
        assert not tables.has_part[kind].any()
    assert not tables.has_others.any()
    assert tables.max_stacked[1, qkv] == 24


def test_a_factor_on_inputs_beside_a_sparse_delta_in_one_module_is_refused() -> None:
    spec = AdapterSpec(
        "ab" * 32, (ModuleSpec(1, "o_proj", (InVector(), SparseDelta(5))), ModuleSpec(1, "k_proj", (Bias(),)))
    )

    with pytest.raises(ImageError, match=r"layer 1 o_proj: .* a factor on inputs and a sparse delta in one module"):
        check_parts(spec)
    check_parts(
        AdapterSpec("ab" * 32, (ModuleSpec(1, "o_proj", (InVector(),)), ModuleSpec(1, "k_proj", (SparseDelta(5),))))
    )
