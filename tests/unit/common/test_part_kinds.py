"""A further kind of part goes through spec, layout and packing that know nothing of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from loraplex_common.adapter_image import (
    KIND_A,
    KIND_B,
    LOW_RANK,
    AdapterSpec,
    Geometry,
    ImageError,
    ModuleSpec,
    layout,
    pack,
    tile_values,
)
from loraplex_common.adapter_parts import KINDS, check_kinds
from loraplex_common.low_rank import LowRank
from support.decoder_shapes import decoder_geometry
from support.part_kinds import KIND_C, OUT_VECTOR, OutVector, OutVectorKind

GEOMETRY = decoder_geometry(
    dtype="float32",
    page_bytes=16 * 1024,
    num_layers=2,
    hidden_size=256,
    intermediate_size=8192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
SPEC = AdapterSpec(
    "cd" * 32,
    (
        ModuleSpec.low_rank(0, "q_proj", 4, 0.5),
        ModuleSpec(0, "v_proj", (LowRank(8, 2.0), OutVector(3.0))),
        ModuleSpec(1, "up_proj", (OutVector(5.0),)),
    ),
)


@pytest.fixture(autouse=True)
def out_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, OUT_VECTOR, OutVectorKind())


def tensors_of(geometry: Geometry, spec: AdapterSpec) -> dict[tuple[int, str, str], tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(0)
    return {
        (layer, name, kind): tuple(
            rng.standard_normal(shape, dtype=np.float32)
            for shape in KINDS[kind].shapes(geometry.projection(layer, name), size).values()
        )
        for layer, name, kind, size in spec.sizes
    }


def test_both_kinds_read_back_equal() -> None:
    tensors = tensors_of(GEOMETRY, SPEC)
    image = pack(GEOMETRY, SPEC, tensors)

    read: dict[tuple[int, int, int], list[np.ndarray]] = {}
    for tile in layout(GEOMETRY, SPEC.sizes).tiles:
        key = (int(tile["layer"]), int(tile["kind"]), int(tile["slice"]))
        read.setdefault(key, []).append(tile_values(GEOMETRY, image, tile))

    (q_a, q_b), (v_a, v_b) = tensors[0, "q_proj", LOW_RANK], tensors[0, "v_proj", LOW_RANK]
    np.testing.assert_array_equal(np.concatenate(read[0, KIND_A, 0], axis=1), np.concatenate([q_a, v_a]))
    np.testing.assert_array_equal(np.concatenate(read[0, KIND_B, 0]), q_b)
    np.testing.assert_array_equal(np.concatenate(read[0, KIND_B, 2]), v_b)
    np.testing.assert_array_equal(np.concatenate(read[0, KIND_C, 2], axis=1)[0], tensors[0, "v_proj", OUT_VECTOR][0])
    np.testing.assert_array_equal(np.concatenate(read[1, KIND_C, 1], axis=1)[0], tensors[1, "up_proj", OUT_VECTOR][0])
    assert len(read[1, KIND_C, 1]) == 2, "8192 outputs are more than a page: the case is too easy"
    assert len(read) == 5


def test_an_ops_further_parts_follow_its_pairs() -> None:
    tiles = layout(GEOMETRY, SPEC.sizes).tiles
    kinds = tiles["kind"][tiles["layer"] == 0].tolist()
    pairs_only = AdapterSpec(
        SPEC.digest, tuple(ModuleSpec(m.layer, m.projection, m.parts[:1]) for m in SPEC.modules[:2])
    )

    assert kinds == sorted(kinds)
    np.testing.assert_array_equal(tiles[: len(kinds) - 1], layout(GEOMETRY, pairs_only.sizes).tiles)


def test_a_spec_with_further_parts_survives_json() -> None:
    assert AdapterSpec.from_json(SPEC.to_json()) == SPEC


def test_a_spec_of_pairs_is_written_as_it_always_was() -> None:
    spec = AdapterSpec("ab", (ModuleSpec.low_rank(1, "o_proj", 4, 2.0),))

    assert spec.to_json() == b'{"digest":"ab","modules":[{"layer":1,"projection":"o_proj","rank":4,"scaling":2.0}]}'


def test_a_kind_that_this_version_does_not_know_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SPEC.to_json()
    monkeypatch.delitem(KINDS, OUT_VECTOR)

    with pytest.raises(
        ImageError, match=r"layer 0 v_proj: part kind 'test_vector' is not one of low_rank, .*: upgrade"
    ):
        AdapterSpec.from_json(data)
    with pytest.raises(ImageError, match="layer 0 v_proj: part kind 'test_vector' is not one of low_rank"):
        layout.__wrapped__(GEOMETRY, SPEC.sizes)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("ab", "a module: expected an object, got str"),
        ({"layer": 0, "projection": "q_proj"}, "layer 0 q_proj: no part"),
        ({"layer": 0, "projection": "q_proj", "parts": {}}, "layer 0 q_proj: no part"),
        (
            {"layer": 0, "projection": "q_proj", "parts": None},
            "layer 0 q_proj: parts: expected an object, got NoneType",
        ),
        (
            {"layer": 0, "projection": "q_proj", "parts": [LOW_RANK]},
            "layer 0 q_proj: parts: expected an object, got list",
        ),
        ({"layer": 0, "projection": "q_proj", "parts": {OUT_VECTOR: 3}}, "must be a mapping, not int"),
        ({"layer": 0, "projection": "q_proj", "rank": 4}, "scaling"),
    ],
    ids=str,
)
def test_a_module_that_no_version_writes_is_refused(module: object, message: str) -> None:
    data = json.dumps({"digest": SPEC.digest, "modules": [module]}).encode()

    with pytest.raises((ImageError, TypeError), match=message):
        AdapterSpec.from_json(data)


def test_a_backend_without_the_kind_refuses_the_adapter_by_name() -> None:
    check_kinds(SPEC, (LOW_RANK, OUT_VECTOR), "torch")
    with pytest.raises(ImageError, match="layer 0 v_proj: backend torch does not compute parts of kind 'test_vector'"):
        check_kinds(SPEC, (LOW_RANK,), "torch")


def test_a_value_of_a_further_part_that_is_not_finite_is_refused_by_its_name() -> None:
    tensors = tensors_of(GEOMETRY, SPEC)
    tensors[1, "up_proj", OUT_VECTOR][0][5000] = np.nan

    with pytest.raises(ImageError, match="layer 1 gate_up up_proj c holds a value that is not finite"):
        pack(GEOMETRY, SPEC, tensors)
