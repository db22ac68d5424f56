"""Modules outside of the decoder layers are one more layer of a geometry, and rows of tokens a part of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.v1 import adapter_pb2
from loraplex_common import geometry_wire
from loraplex_common.adapter_image import (
    AdapterSpec,
    Geometry,
    ImageError,
    ModuleSpec,
    layout,
    pack,
    pair_sizes,
    tile_values,
)
from loraplex_common.adapter_parts import KINDS, PartSize, check_inside
from loraplex_common.architectures.registry import ARCHITECTURES, model_config
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.low_rank import LowRank
from loraplex_common.projections import Projection
from loraplex_common.token_rows import KIND_IDS, KIND_ROW_VALUES, ROWS, Rows

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 301,
}
NEEDED: dict[str, dict[str, Any]] = {
    "GraniteMoeHybridForCausalLM": {"num_local_experts": 0, "layer_types": ["attention", "attention"]},
    "Ministral3ForCausalLM": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
"""What an architecture does not do without."""
MODEL = model_config({**CONFIG, "architectures": ["LlamaForCausalLM"]})
OUTSIDE = 2


def geometry(dtype: str = "float32", page_bytes: int = 4096) -> Geometry:
    return Geometry.of(MODEL.layers, MODEL.outside, dtype=dtype, page_bytes=page_bytes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_offers_its_embedding_and_lm_head(name: str) -> None:
    read = model_config({**CONFIG, **NEEDED.get(name, {}), "architectures": [name]})

    assert [(each.path, each.op, each.shape) for each in read.outside] == [
        ("model.embed_tokens", "embed", (301, 64)),
        ("lm_head", "head", (64, 301)),
    ]
    assert len(read.layers) == read.num_layers == 2


def test_they_are_the_last_layer_which_is_none_of_the_decoders() -> None:
    found = geometry()

    assert (found.num_layers, found.num_decoder_layers, found.outside) == (3, 2, OUTSIDE)
    layers = tuple(tuple(replace(each, sections=()) for each in layer) for layer in MODEL.layers)  # none, for one rank
    assert found.decoder_layers == layers
    assert found.layers == (*layers, MODEL.outside)
    assert [op.name for op in found.decoder_ops] == ["qkv", "o", "gate_up", "down"]
    assert [op.name for op in found.ops[found.num_decoder_ops :]] == ["embed", "head"]
    plain = Geometry.of(MODEL.layers, dtype="float32", page_bytes=4096)
    assert (plain.num_layers, plain.outside, plain.decoder_ops) == (2, None, plain.ops)


def test_an_adapter_within_the_layers_has_the_same_image_without_them() -> None:
    sizes = pair_sizes([(0, "q_proj", 4), (1, "down_proj", 8)])

    with_them, without = (
        layout(geometry(), sizes),
        layout(Geometry.of(MODEL.layers, dtype="float32", page_bytes=4096), sizes),
    )
    np.testing.assert_array_equal(with_them.tiles, without.tiles)


def test_the_wire_has_them_beside_the_layers_so_that_older_readers_see_the_layers_alone() -> None:
    sent = geometry_wire.to_message(geometry())
    assert geometry_wire.from_message(adapter_pb2.Geometry.FromString(sent.SerializeToString())) == geometry()

    sent.ClearField("outside")
    assert geometry_wire.from_message(sent) == Geometry.of(MODEL.layers, dtype="float32", page_bytes=4096)
    assert len(sent.layer_indices) == 2


def test_of_another_layout_version_they_are_not_read() -> None:
    sent = geometry_wire.to_message(geometry())
    sent.layout_version, sent.outside[0].split = 99, adapter_pb2.Projection.SPLIT_UNSPECIFIED

    with pytest.raises(ImageError, match="layout version 99 is not"):
        geometry_wire.from_message(sent)


def test_they_count_among_the_projections_that_are_read() -> None:
    sent = adapter_pb2.Geometry(layout_version=2, dtype="float32", page_bytes=4096)
    for index in range(geometry_wire.MAX_PROJECTIONS + 1):
        sent.outside.add(path=f"p{index}", op="head", in_features=8, out_features=8, split=1)

    with pytest.raises(ImageError, match="4097 projections exceed"):
        geometry_wire.from_message(sent)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"tp_degree": 2}, "not divided over tp_degree 2"),
        ({"layer_indices": (0, 1, 1)}, "a description of its own"),
        ({"layer_indices": (0, 1, 0)}, "a description of its own"),
        ({"layer_indices": ()}, "a description of its own"),
        (
            {"distinct_layers": (MODEL.layers[0], (Projection("norm", "norm", 64, 64),))},
            "neither embedding nor lm_head",
        ),
    ],
)
def test_a_geometry_that_mixes_them_with_the_layers_is_refused(more: dict[str, Any], match: str) -> None:
    fields: dict[str, Any] = {
        "dtype": "float32",
        "page_bytes": 4096,
        "distinct_layers": (MODEL.layers[0], MODEL.outside),
        "layer_indices": (0, 0, 1),
        "has_outside": True,
    }
    Geometry(**fields)
    with pytest.raises(ImageError, match=match):
        Geometry(**fields | more)


def test_an_engine_without_them_refuses_an_adapter_of_them_by_name() -> None:
    without = Geometry.of(MODEL.layers, dtype="float32", page_bytes=4096)

    with pytest.raises(ImageError, match=r"lm_head is outside of the decoder layers.*one tensor-parallel rank"):
        layout(without, (PartSize(OUTSIDE, "lm_head", ROWS, 3),))
    with pytest.raises(ImageError, match="layer 3 does not exist: the base model has 2"):
        layout(without, pair_sizes([(3, "q_proj", 4)]))


def test_a_backend_that_does_not_compute_them_refuses_them_by_name() -> None:
    inside = AdapterSpec("ab" * 32, (ModuleSpec.low_rank(1, "q_proj", 4, 1.0),))
    beside = AdapterSpec("ab" * 32, (*inside.modules, ModuleSpec.low_rank(OUTSIDE, "lm_head", 4, 1.0)))

    check_inside(inside, geometry(), "torch")
    check_inside(beside, Geometry.of(MODEL.layers, dtype="float32", page_bytes=4096), "torch")
    with pytest.raises(ImageError, match="lm_head: backend torch computes no adapters of modules outside"):
        check_inside(beside, geometry(), "torch")


def test_a_spec_tells_of_its_rows_and_has_no_scale() -> None:
    modules = (
        ModuleSpec(OUTSIDE, "embed_tokens", (LowRank(4, 0.5), Rows(2, 310))),
        ModuleSpec(OUTSIDE, "lm_head", (Rows(5, 12),)),
    )
    spec = AdapterSpec("ab" * 32, modules)

    assert AdapterSpec.from_json(spec.to_json()) == spec
    assert spec.last_row_id == 310
    assert spec.unscalable == PartSize(OUTSIDE, "embed_tokens", ROWS, 2)
    plain = AdapterSpec("ab" * 32, (ModuleSpec.low_rank(OUTSIDE, "lm_head", 4, 1.0),))
    assert (plain.last_row_id, plain.unscalable) == (-1, None)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16"]),
    page_bytes=st.sampled_from([1024, 4096 + 128, 256 * 1024]),
    counts=st.tuples(st.integers(0, 400), st.integers(0, 400)).filter(any),
    seed=st.integers(0, 99),
)
def test_rows_read_back_equal_each_in_one_tile(dtype: str, page_bytes: int, counts: tuple[int, int], seed: int) -> None:
    rng, found = np.random.default_rng(seed), geometry(dtype, page_bytes)
    values, modules = {}, []
    for name, count in zip(("embed_tokens", "lm_head"), counts, strict=True):
        if count:
            ids = np.sort(rng.choice(1000, count, replace=False)).astype(np.int32)
            values[OUTSIDE, name, ROWS] = ids, rng.standard_normal((count, 64), dtype=np.float32)
            modules.append(ModuleSpec(OUTSIDE, name, (Rows(count, int(ids[-1])),)))
    spec = AdapterSpec("ab" * 32, tuple(modules))

    image, tiles = pack(found, spec, values), layout(found, spec.sizes).tiles

    for (_, name, _), (ids, rows) in values.items():
        own = tiles[tiles["op"] == found.place(OUTSIDE, name)[0]]
        read = [tile_values(found, image, tile) for tile in own[own["kind"] == KIND_IDS]]
        np.testing.assert_array_equal(np.concatenate(read, axis=1)[0], ids)
        read = [tile_values(found, image, tile) for tile in own[own["kind"] == KIND_ROW_VALUES]]
        expected = rows if dtype == "float32" else from_bfloat16(to_bfloat16(rows))
        np.testing.assert_array_equal(np.concatenate(read), expected)


def test_a_row_that_exceeds_a_tile_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ImageError, match="lm_head: a row of 64 x 4 = 256 bytes exceeds a tile of 128"):
        layout(geometry(page_bytes=128), (PartSize(OUTSIDE, "lm_head", ROWS, 1),))


def test_projections_of_the_layers_have_no_rows_to_replace() -> None:
    with pytest.raises(ImageError, match="qkv: only the embedding and lm_head have rows"):
        layout(geometry(), (PartSize(0, "q_proj", ROWS, 1),))


def test_image_entries_of_all_kinds_have_numbers_of_their_own() -> None:
    numbers = [number for kind in KINDS.values() for number in kind.entries]

    assert len(numbers) == len(set(numbers))
