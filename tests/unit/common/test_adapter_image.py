"""The image layout against plain tensors: nothing lost, nothing twice, nothing across a page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common import adapter_image
from loraplex_common.adapter_image import (
    ITEM_BYTES,
    KIND_A,
    TILE_ALIGN,
    AdapterSpec,
    Geometry,
    ImageError,
    ModuleSpec,
    image_sha256,
    layout,
    pack,
    pair_sizes,
    tile_values,
)
from loraplex_common.bfloat16 import from_bfloat16, is_finite, to_bfloat16
from support.decoder_shapes import OPS, PROJECTIONS, ROW_PARALLEL, decoder_geometry, pair_tensors

DIGEST = "ab" * 32


@dataclass(frozen=True, slots=True)
class Case:
    geometry: Geometry
    spec: AdapterSpec
    tensors: dict[tuple[int, str], tuple[Any, Any]]


def make_geometry(*, intermediate_size: int = 512, **changes: Any) -> Geometry:
    base = decoder_geometry(
        dtype="bfloat16",
        page_bytes=64 * 1024,
        num_layers=3,
        hidden_size=256,
        intermediate_size=intermediate_size,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    )
    return replace(base, **changes)


def make_case(geometry: Geometry, ranks: dict[tuple[int, str], int], seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    modules = tuple(
        ModuleSpec.low_rank(layer, projection, ranks[layer, projection], 0.5)
        for layer in range(geometry.num_layers)
        for projection in PROJECTIONS
        if (layer, projection) in ranks
    )
    tensors = {}
    for key, rank in ranks.items():
        columns, outputs = geometry.projection(0, key[1]).shape
        a = rng.standard_normal((rank, columns), dtype=np.float32)
        tensors[key] = (a, rng.standard_normal((outputs, rank), dtype=np.float32))
    return Case(geometry, AdapterSpec(DIGEST, modules), tensors)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tp_degree = draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([8, 32, 64]))
    num_kv_heads = draw(st.sampled_from([2, 4]))
    geometry = decoder_geometry(
        dtype=draw(st.sampled_from(list(ITEM_BYTES))),
        page_bytes=draw(st.sampled_from([16 * 1024, 40 * 1024 + 128, 64 * 1024, 256 * 1024])),
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.sampled_from([64, 96, 200, 576])),
        intermediate_size=draw(st.sampled_from([128, 344, 1536])),
        num_heads=num_kv_heads * draw(st.sampled_from([1, 3])),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tp_degree=tp_degree,
    )
    keys = st.tuples(st.integers(0, geometry.num_layers - 1), st.sampled_from(PROJECTIONS))
    ranks = draw(st.dictionaries(keys, st.one_of(st.integers(1, 8), st.integers(9, 96)), min_size=1))
    return make_case(geometry, ranks, seed=draw(st.integers(0, 2**16)))


def local_tensors(case: Case, layer: int, projection: str, tp_rank: int) -> tuple[Any, Any]:
    """A and B as one tensor-parallel rank holds them, by numpy's own splitting."""
    a, b = case.tensors[layer, projection]
    degree = case.geometry.tp_degree
    if projection in ROW_PARALLEL:
        return np.split(a, degree, axis=1)[tp_rank], b
    return a, np.split(b, degree, axis=0)[tp_rank]


def stacked_rows(spec: AdapterSpec) -> dict[tuple[int, str], tuple[int, int]]:
    """By (layer, projection), the half-open rows that a slice takes in its op's stacked A."""
    rank_of = {(module.layer, module.projection): module.rank for module in spec.modules}
    rows: dict[tuple[int, str], tuple[int, int]] = {}
    for layer in {layer for layer, _ in rank_of}:
        for slices in OPS.values():
            present = [name for name in slices if (layer, name) in rank_of]
            stops = list(itertools.accumulate(rank_of[layer, name] for name in present))
            rows |= {
                (layer, name): (stop - rank_of[layer, name], stop) for name, stop in zip(present, stops, strict=True)
            }
    return rows


def rounded(case: Case, values: Any) -> Any:
    return from_bfloat16(to_bfloat16(values)) if case.geometry.dtype == "bfloat16" else values


@settings(max_examples=60, deadline=None)
@given(cases())
def test_tiles_cover_every_element_exactly_once_and_read_back_equal(case: Case) -> None:
    for tp_rank in range(case.geometry.tp_degree):
        image = pack(case.geometry, case.spec, pair_tensors(case.tensors), tp_rank)
        rows = stacked_rows(case.spec)
        read = {key: [np.full_like(t, np.nan) for t in local_tensors(case, *key, tp_rank)] for key in case.tensors}
        counts = {key: [np.zeros(t.shape, int) for t in pair] for key, pair in read.items()}

        for tile in layout(case.geometry, case.spec.sizes).tiles:
            values, layer, start = tile_values(case.geometry, image, tile), int(tile["layer"]), int(tile["start"])
            slices = OPS[tuple(OPS)[tile["op"]]]
            if tile["kind"] == KIND_A:
                for projection in slices:
                    if (layer, projection) in rows:
                        first, last = rows[layer, projection]
                        read[layer, projection][0][:, start : start + values.shape[1]] = values[first:last]
                        counts[layer, projection][0][:, start : start + values.shape[1]] += 1
            else:
                projection = slices[tile["slice"]]
                read[layer, projection][1][start : start + values.shape[0]] = values
                counts[layer, projection][1][start : start + values.shape[0]] += 1

        for key in case.tensors:
            for got, count, expected in zip(read[key], counts[key], local_tensors(case, *key, tp_rank), strict=True):
                assert (count == 1).all()
                np.testing.assert_array_equal(got, rounded(case, expected))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_tiles_are_aligned_disjoint_and_within_one_page(case: Case) -> None:
    geometry, plan = case.geometry, layout(case.geometry, case.spec.sizes)
    sizes = plan.tiles["rows"].astype(np.int64) * plan.tiles["cols"] * ITEM_BYTES[geometry.dtype]
    starts = plan.tiles["page"].astype(np.int64) * geometry.page_bytes + plan.tiles["offset"]

    assert (plan.tiles["offset"] % TILE_ALIGN == 0).all()
    assert (sizes <= geometry.tile_bytes).all()
    assert (plan.tiles["offset"] + sizes <= geometry.page_bytes).all()
    assert (starts[1:] >= (starts + sizes)[:-1]).all()
    assert plan.used_bytes == int(starts[-1] + sizes[-1])
    assert plan.num_pages == -(-plan.used_bytes // geometry.page_bytes)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_waste_is_less_than_a_tile_a_page_and_alignment(case: Case) -> None:
    geometry, plan = case.geometry, layout(case.geometry, case.spec.sizes)
    payload = int((plan.tiles["rows"].astype(np.int64) * plan.tiles["cols"]).sum()) * ITEM_BYTES[geometry.dtype]

    bound = plan.num_pages * geometry.tile_bytes + len(plan.tiles) * TILE_ALIGN

    assert plan.used_bytes - payload < bound


def test_bytes_of_no_tile_are_zero() -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 3, (2, "down_proj"): 5})
    image = pack(case.geometry, case.spec, pair_tensors(case.tensors)).reshape(-1)
    plan = layout(case.geometry, case.spec.sizes)
    is_payload = np.zeros(image.size, bool)
    for tile in plan.tiles:
        start = int(tile["page"]) * case.geometry.page_bytes + int(tile["offset"])
        is_payload[start : start + int(tile["rows"]) * int(tile["cols"]) * 2] = True

    assert not image[~is_payload].any()
    assert image[is_payload].any()


def test_a_missing_slice_takes_no_rows_of_the_stacked_a() -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 4, (0, "v_proj"): 6, (1, "v_proj"): 2})

    rows = stacked_rows(case.spec)
    tiles = layout(case.geometry, case.spec.sizes).tiles

    assert dict(rows) == {(0, "q_proj"): (0, 4), (0, "v_proj"): (4, 10), (1, "v_proj"): (0, 2)}
    assert {int(tile["rows"]) for tile in tiles if tile["kind"] == KIND_A and tile["layer"] == 0} == {10}


def test_neighbouring_b_tiles_in_a_page_are_contiguous() -> None:
    case = make_case(make_geometry(intermediate_size=4096), {(0, "gate_proj"): 48})
    tiles = [tile for tile in layout(case.geometry, case.spec.sizes).tiles if tile["kind"] != KIND_A]

    assert len(tiles) > 2
    for left, right in itertools.pairwise(tiles):
        if left["page"] == right["page"]:
            assert right["offset"] == left["offset"] + left["rows"] * left["cols"] * 2


@pytest.mark.parametrize(("dtype", "rank"), [("bfloat16", 128), ("bfloat16", 512), ("float32", 64), ("float32", 256)])
def test_large_ranks_on_all_of_qkv_fit(dtype: str, rank: int) -> None:
    case = make_case(make_geometry(dtype=dtype), {(0, name): rank for name in OPS["qkv"]})

    image = pack(case.geometry, case.spec, pair_tensors(case.tensors))

    tile = layout(case.geometry, case.spec.sizes).tiles[0]
    assert tile["cols"] % 8 == 0
    np.testing.assert_array_equal(
        tile_values(case.geometry, image, tile)[:rank], rounded(case, case.tensors[0, "q_proj"][0][:, : tile["cols"]])
    )


def test_a_rank_beyond_any_tile_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match=r"layer 0 qkv: stacked rank 6000"):
        layout(make_geometry(), pair_sizes([(0, "q_proj", 6000)]))


def test_the_same_ranks_share_one_cached_layout() -> None:
    first = make_case(make_geometry(), {(0, "q_proj"): 4}, seed=1)
    second = make_case(make_geometry(), {(0, "q_proj"): 4}, seed=2)

    assert layout(first.geometry, first.spec.sizes) is layout(second.geometry, second.spec.sizes)
    with pytest.raises(ValueError, match="read-only"):
        layout(first.geometry, first.spec.sizes).tiles["page"] = 0


def test_an_image_depends_on_the_tensors_alone() -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 4, (1, "o_proj"): 8})
    shuffled = dict(reversed(case.tensors.items()))

    assert image_sha256(pack(case.geometry, case.spec, pair_tensors(case.tensors))) == image_sha256(
        pack(case.geometry, case.spec, pair_tensors(shuffled))
    )


def test_strided_tensors_pack_like_contiguous_ones() -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 4})
    strided = {key: (np.asfortranarray(a), np.asfortranarray(b)) for key, (a, b) in case.tensors.items()}

    assert (
        pack(case.geometry, case.spec, pair_tensors(strided))
        == pack(case.geometry, case.spec, pair_tensors(case.tensors))
    ).all()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (((3, "q_proj", 4),), "layer 3 does not exist"),
        (((0, "lm_head", 4),), "'lm_head' is not one of"),
        (((0, "q_proj", 0),), "rank 0 is not positive"),
        (((0, "q_proj", 4), (0, "q_proj", 8)), "adapted twice"),
    ],
)
def test_modules_that_do_not_exist_are_refused(ranks: tuple[tuple[int, str, int], ...], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        layout(make_geometry(), pair_sizes(ranks))


def test_a_wrong_shape_is_refused_with_both_shapes() -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 4})
    a, b = case.tensors[0, "q_proj"]

    with pytest.raises(ImageError, match=r"layer 0 q_proj lora_A has shape \(4, 255\), expected \(4, 256\)"):
        pack(case.geometry, case.spec, pair_tensors({(0, "q_proj"): (a[:, :-1], b)}))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_tensors_that_the_spec_does_not_name_are_refused(change: str) -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 4, (1, "k_proj"): 4})
    tensors = dict(case.tensors)
    if change == "missing":
        del tensors[1, "k_proj"]
    else:
        tensors[1, "v_proj"] = tensors[1, "k_proj"]

    with pytest.raises(ImageError, match=r"layer 1 [kv]_proj: in only one of spec and tensors"):
        pack(case.geometry, case.spec, pair_tensors(tensors))


@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("matrix", [0, 1])
def test_values_that_are_not_finite_are_refused(dtype: str, value: float, matrix: int) -> None:
    case = make_case(make_geometry(dtype=dtype), {(0, "q_proj"): 4})
    case.tensors[0, "q_proj"][matrix][1, 2] = value

    with pytest.raises(ImageError, match=f"not finite in {dtype}"):
        pack(case.geometry, case.spec, pair_tensors(case.tensors))


def test_a_value_that_overflows_bfloat16_only_is_refused_there() -> None:
    largest = np.finfo(np.float32).max
    for dtype in ITEM_BYTES:
        case = make_case(make_geometry(dtype=dtype), {(0, "q_proj"): 4})
        case.tensors[0, "q_proj"][0][0, 0] = largest
        if dtype == "float32":
            pack(case.geometry, case.spec, pair_tensors(case.tensors))
        else:
            with pytest.raises(ImageError, match="not finite in bfloat16"):
                pack(case.geometry, case.spec, pair_tensors(case.tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"page_bytes": 0},
        {"page_bytes": 1000},
        {"layout_version": 1},
        {"tp_degree": 3},
        {"tp_degree": 0},
    ],
)
def test_a_geometry_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        make_geometry(**changes)


def test_a_tensor_parallel_rank_that_does_not_exist_is_refused() -> None:
    case = make_case(make_geometry(tp_degree=2), {(0, "q_proj"): 4})

    with pytest.raises(ImageError, match="rank 2 does not exist"):
        pack(case.geometry, case.spec, pair_tensors(case.tensors), tp_rank=2)


def test_a_spec_survives_json() -> None:
    case = make_case(make_geometry(), {(0, "q_proj"): 4, (2, "down_proj"): 64})

    assert AdapterSpec.from_json(case.spec.to_json()) == case.spec
    assert case.spec.max_rank == 64
    assert AdapterSpec(DIGEST, ()).max_rank == 0


def test_an_adapter_without_modules_takes_no_page() -> None:
    image = pack(make_geometry(), AdapterSpec(DIGEST, ()), {})

    assert image.shape == (0, make_geometry().page_bytes)


def every_upper_half() -> Any:
    """fp32 with all 65,536 upper halves, each with lower halves around the points where rounding turns."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    return (upper[:, None] | lower[None, :]).reshape(-1).view(np.float32)


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = every_upper_half()

    got = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(values).to(torch.bfloat16)

    is_nan = expected.isnan()
    assert torch.equal(got.isnan(), is_nan)
    assert torch.equal(got[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))


def test_bfloat16_widens_exactly_and_knows_what_is_finite() -> None:
    values = every_upper_half()
    finite = values[np.isfinite(from_bfloat16(to_bfloat16(values)))]

    np.testing.assert_array_equal(to_bfloat16(from_bfloat16(to_bfloat16(finite))), to_bfloat16(finite))
    assert is_finite(to_bfloat16(finite))
    assert not is_finite(to_bfloat16(np.array([1.0, np.nan], np.float32)))
    assert not is_finite(to_bfloat16(np.array([3.4e38], np.float32)))


def test_every_public_name_exists() -> None:
    assert all(hasattr(adapter_image, name) for name in adapter_image.__all__)
