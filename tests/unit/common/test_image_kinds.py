"""Images of any mix of parts hold every element once, in the types of their entries, for every tensor-parallel rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.adapter_image import ITEM_BYTES, AdapterSpec, ModuleSpec, layout, pack, tile_values
from loraplex_common.adapter_parts import KINDS
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.flora import KIND_FLORA_B, Flora
from loraplex_common.low_rank import KIND_A, KIND_B, LowRank
from loraplex_common.sparse_delta import SparseDelta
from loraplex_common.vectors import IN_VECTOR, Bias, InVector, OutVector
from support.decoder_shapes import OPS, PROJECTIONS, decoder_geometry

if TYPE_CHECKING:
    from random import Random

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.part_kind import Arrays, Part
    from loraplex_common.projections import Projection

Values = dict[tuple[int, str, str], "Arrays"]


def make_geometry(dtype: str = "float32", tp_degree: int = 1, page_bytes: int = 16 * 1024) -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=page_bytes,
        num_layers=2,
        hidden_size=192,
        intermediate_size=4608,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        tp_degree=tp_degree,
    )


def random_values(part: Part, projection: Projection, rng: np.random.Generator) -> Arrays:
    """Return values of a part; of a sparse delta some rows have none."""
    if not isinstance(part, SparseDelta):
        shapes = KINDS[part.kind].shapes(projection, part.size).values()
        return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    places = np.sort(rng.choice(projection.in_features * projection.out_features, part.size, replace=False))
    rows, columns = places // projection.in_features, places % projection.in_features
    starts = np.searchsorted(rows, np.arange(projection.out_features + 1))
    return rng.standard_normal(part.size, dtype=np.float32), columns.astype(np.int32), starts.astype(np.int32)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[Geometry, AdapterSpec, Values]:
    tp_degree = draw(st.sampled_from([1, 1, 2]))
    page_bytes = draw(st.sampled_from([8 * 1024, 16 * 1024 + 128, 256 * 1024]))
    geometry = make_geometry(draw(st.sampled_from(list(ITEM_BYTES))), tp_degree, page_bytes)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    parts: list[Part] = [
        LowRank(draw(st.integers(1, 24)), 0.5),
        OutVector(is_magnitude=draw(st.booleans())),
        Bias(),
        Flora(draw(st.integers(1, 8))),
        SparseDelta(draw(st.integers(1, 6000)), 2.0),
    ]
    chosen = st.lists(st.sampled_from(parts), unique_by=lambda part: part.kind, max_size=len(parts))
    found: dict[tuple[int, str], list[Part]] = {
        (layer, name): list(draw(chosen)) for layer in range(2) for name in PROJECTIONS if draw(st.booleans())
    }
    for layer in range(2):  # e is of a whole op or of none of its slices
        for slices in OPS.values():
            if draw(st.integers(0, 3)) == 0:
                for name in slices:
                    found.setdefault((layer, name), []).append(InVector())
    modules = tuple(ModuleSpec(*key, tuple(parts)) for key, parts in sorted(found.items()) if parts)
    values: Values = {
        (module.layer, module.projection, part.kind): random_values(
            part, geometry.projection(module.layer, module.projection), rng
        )
        for module in modules
        for part in module.parts
    }
    for layer, name, kind in list(values):
        if kind == IN_VECTOR:
            op = next(slices for slices in OPS.values() if name in slices)
            values[layer, name, kind] = values[layer, op[0], kind]
    return geometry, AdapterSpec("ef" * 32, modules), values


def expected_tile(geometry: Geometry, spec: AdapterSpec, values: Values, tile: Any, tp_rank: int) -> np.ndarray:
    """Return what a tile has to hold, by numpy's own slicing of the whole tensors."""
    layer, slices = int(tile["layer"]), OPS[tuple(OPS)[tile["op"]]]
    kind = next(each for each in KINDS.values() if int(tile["kind"]) in each.entries)
    own = [values.get((layer, name, kind.name)) for name in slices]
    local = [
        None if each is None else kind.local(geometry.projection(layer, name), each, tp_rank, geometry.tp_degree)
        for name, each in zip(slices, own, strict=True)
    ]
    index = sorted(kind.entries).index(int(tile["kind"]))
    if tile["kind"] == KIND_A:
        matrix: Any = np.concatenate([each[0] for each in local if each is not None])
    elif kind.name == IN_VECTOR:
        matrix = next(each[0] for each in local if each is not None)
    else:
        part = local[tile["slice"]]
        assert part is not None
        matrix = part[index].T if tile["kind"] == KIND_FLORA_B else part[index]
    start = int(tile["start"])
    if tile["kind"] == KIND_B:
        return np.asarray(matrix[start : start + tile["rows"]])
    return np.atleast_2d(matrix)[:, start : start + int(tile["cols"])]


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_tiles_of_mixed_kinds_read_back_equal(adapter: tuple[Geometry, AdapterSpec, Values]) -> None:
    geometry, spec, values = adapter
    for tp_rank in range(geometry.tp_degree):
        image = pack(geometry, spec, values, tp_rank)

        num_read: dict[int, int] = {}
        for tile in layout(geometry, spec.sizes).tiles:
            found = tile_values(geometry, image, tile)
            expected = expected_tile(geometry, spec, values, tile, tp_rank)
            kind = next(each for each in KINDS.values() if int(tile["kind"]) in each.entries)
            if kind.entries[int(tile["kind"])].dtype == "compute" and geometry.dtype == "bfloat16":
                expected = from_bfloat16(to_bfloat16(expected))
            np.testing.assert_array_equal(found, expected)
            num_read[int(tile["kind"])] = num_read.get(int(tile["kind"]), 0) + found.size

        for kind in KINDS.values():
            for index, entry in enumerate(sorted(kind.entries)):
                assert num_read.get(entry, 0) == elements(geometry, values, kind.name, index, tp_rank)


@settings(max_examples=60, deadline=None)
@given(adapters(), st.randoms(use_true_random=False))
def test_an_image_is_the_same_from_stored_types_and_from_fp32(
    adapter: tuple[Geometry, AdapterSpec, Values], random: Random
) -> None:
    geometry, spec, values = adapter
    bits = {
        key: tuple(to_bfloat16(each) if each.dtype.kind == "f" else each for each in arrays)
        for key, arrays in values.items()
    }
    wide = {key: tuple(widened(each) for each in arrays) for key, arrays in bits.items()}
    mixed = {key: random.choice([bits[key], wide[key]]) for key in bits}

    expected = pack(geometry, spec, wide)
    np.testing.assert_array_equal(pack(geometry, spec, bits), expected)
    np.testing.assert_array_equal(pack(geometry, spec, mixed), expected)


def widened(values: np.ndarray) -> np.ndarray:
    return from_bfloat16(values) if values.dtype == np.uint16 else values


def elements(geometry: Geometry, values: Values, kind: str, index: int, tp_rank: int) -> int:
    """Return how many elements of one tensor of all parts a rank holds; slices of an op have one e together."""
    total = 0
    for (layer, name, found), arrays in values.items():
        if found == kind and (kind != IN_VECTOR or any(name == slices[0] for slices in OPS.values())):
            projection = geometry.projection(layer, name)
            total += KINDS[kind].local(projection, arrays, tp_rank, geometry.tp_degree)[index].size
    return total


def test_ranks_that_divide_the_input_add_a_bias_once_and_scale_partial_sums_alike() -> None:
    geometry = make_geometry(tp_degree=2)
    spec = AdapterSpec("ef" * 32, (ModuleSpec(0, "o_proj", (OutVector(), Bias())),))
    rng = np.random.default_rng(0)
    values: Values = {
        (0, "o_proj", part.kind): random_values(part, geometry.projection(0, "o_proj"), rng)
        for part in (OutVector(), Bias())
    }

    ranks = [
        [
            tile_values(geometry, pack(geometry, spec, values, rank), tile)[0]
            for tile in layout(geometry, spec.sizes).tiles
        ]
        for rank in range(2)
    ]

    c, b = (values[0, "o_proj", kind][0] for kind in ("out_vector", "bias"))
    np.testing.assert_array_equal(ranks[0], [c, b])
    np.testing.assert_array_equal(ranks[1], [c, np.zeros_like(b)])


def test_a_factor_keeps_fp32_in_an_image_of_bf16() -> None:
    geometry = make_geometry("bfloat16")
    spec = AdapterSpec("ef" * 32, (ModuleSpec(0, "q_proj", (OutVector(),)),))
    c = np.float32(1) + np.arange(192, dtype=np.float32) * np.float32(1e-6)

    image = pack(geometry, spec, {(0, "q_proj", "out_vector"): (c,)})

    np.testing.assert_array_equal(tile_values(geometry, image, layout(geometry, spec.sizes).tiles[0])[0], c)
