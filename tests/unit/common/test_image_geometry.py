"""A geometry takes each layer's projections as the model declares them, and says them compactly on the wire."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from loraplex.v1 import adapter_pb2
from loraplex_common import geometry_wire
from loraplex_common.adapter_image import (
    KIND_A,
    AdapterSpec,
    Geometry,
    ImageError,
    ModuleSpec,
    layout,
    pack,
    pair_sizes,
    tile_values,
)
from loraplex_common.projections import Projection, Split
from support.decoder_shapes import decoder_geometry, pair_tensors

FUSED = (
    Projection("attn.qkv_proj", "attn_in", 128, 320),
    Projection("attn.dense", "attn_out", 192, 128, Split.INPUTS),
    Projection("mlp.up_proj", "mlp_in", 128, 512),
    Projection("mlp.down_proj", "mlp_out", 512, 128, Split.INPUTS),
)
WIDE = (*FUSED[:2], Projection("mlp.up_proj", "mlp_in", 128, 1024))
"""Another width under the same name of the op, and no ``mlp_out``."""
FOUR = tuple(Projection(f"mix.{name}_proj", "four", 128, 64 * (1 + index)) for index, name in enumerate("abcd"))
LAYERS = (FUSED, WIDE, FUSED, FOUR, ())
GEOMETRY = Geometry.of(LAYERS, dtype="float32", page_bytes=64 * 1024)


def test_layers_that_offer_the_same_share_one_description() -> None:
    assert GEOMETRY.layers == LAYERS
    assert GEOMETRY.distinct_layers == (FUSED, WIDE, FOUR, ())
    assert GEOMETRY.layer_indices == (0, 1, 0, 2, 3)


def test_ops_of_one_name_and_other_projections_are_different_ops() -> None:
    names = [op.name for op in GEOMETRY.ops]

    assert names == ["attn_in", "attn_out", "mlp_in", "mlp_out", "mlp_in", "four"]
    assert GEOMETRY.op_indices(0)["mlp_in"] == 2
    assert GEOMETRY.op_indices(1)["mlp_in"] == 4
    assert GEOMETRY.op_indices(2) == GEOMETRY.op_indices(0)
    assert GEOMETRY.op_indices(0)["attn_in"] == GEOMETRY.op_indices(1)["attn_in"]
    assert not GEOMETRY.op_indices(4)


def test_an_adapter_of_layers_that_differ_reads_back_equal() -> None:
    rng, pairs, modules = np.random.default_rng(3), {}, []
    for layer, offered in enumerate(LAYERS):
        for rank, projection in enumerate(offered, start=3):
            a = rng.standard_normal((rank, projection.in_features), dtype=np.float32)
            pairs[layer, projection.name] = a, rng.standard_normal((projection.out_features, rank), dtype=np.float32)
            modules.append(ModuleSpec.low_rank(layer, projection.name, rank, 1.0))
    spec = AdapterSpec("ab" * 32, tuple(modules))
    image, tiles = pack(GEOMETRY, spec, pair_tensors(pairs)), layout(GEOMETRY, spec.sizes).tiles

    for layer, index in itertools.product(range(len(LAYERS)), range(len(GEOMETRY.ops))):
        own = tiles[(tiles["layer"] == layer) & (tiles["op"] == index)]
        op = GEOMETRY.ops[index]
        if GEOMETRY.op_indices(layer).get(op.name) != index:
            assert not len(own), "a layer has tiles of an op that it does not have"
            continue
        stacked = np.concatenate([tile_values(GEOMETRY, image, t) for t in own[own["kind"] == KIND_A]], axis=1)
        np.testing.assert_array_equal(stacked, np.concatenate([pairs[layer, name][0] for name in op.slices]))
        for number, name in enumerate(op.slices):
            b = [tile_values(GEOMETRY, image, t) for t in own[(own["kind"] != KIND_A) & (own["slice"] == number)]]
            np.testing.assert_array_equal(np.concatenate(b), pairs[layer, name][1])


def test_a_projection_that_a_layer_lacks_is_refused_with_what_it_offers() -> None:
    layout(GEOMETRY, pair_sizes([(0, "down_proj", 4)]))
    with pytest.raises(ImageError, match="'down_proj' is not one of qkv_proj, dense, up_proj, which layer 1 offers"):
        layout(GEOMETRY, pair_sizes([(1, "down_proj", 4)]))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ((FUSED[0], replace(FUSED[0], op="x")), "two projections named 'qkv_proj'"),
        ((FUSED[0], replace(FUSED[2], op="attn_in", in_features=64)), "qkv_proj, up_proj, do not share one input"),
        ((replace(FUSED[0], out_features=0),), "attn.qkv_proj: 128 x 0 is no matrix"),
        ((replace(FUSED[0], out_features=321),), "321 outputs of attn.qkv_proj cannot be split over tp_degree 2"),
        ((replace(FUSED[1], in_features=191),), "191 inputs of attn.dense cannot be split over tp_degree 2"),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused_by_name(layer: tuple[Projection, ...], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Geometry.of([layer], dtype="float32", page_bytes=4096, tp_degree=2)


def test_a_geometry_survives_the_wire() -> None:
    sent = geometry_wire.to_message(GEOMETRY).SerializeToString()

    assert geometry_wire.from_message(adapter_pb2.Geometry.FromString(sent)) == GEOMETRY


def test_eighty_equal_layers_cost_a_byte_each_on_the_wire() -> None:
    def num_bytes(num_layers: int) -> int:
        geometry = decoder_geometry(
            dtype="bfloat16",
            page_bytes=2 << 20,
            num_layers=num_layers,
            hidden_size=8192,
            intermediate_size=28672,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
        )
        return len(geometry_wire.to_message(geometry).SerializeToString())

    assert num_bytes(80) == num_bytes(1) + 79
    assert num_bytes(80) < 512


@pytest.mark.parametrize("version", [1, 3])
def test_a_geometry_of_another_version_is_refused_with_the_remedy(version: int) -> None:
    message = adapter_pb2.Geometry(layout_version=version, dtype="float32", page_bytes=4096)
    message.distinct_layers.add().projections.add(path="x", split=adapter_pb2.Projection.SPLIT_UNSPECIFIED)

    with pytest.raises(ImageError, match=f"layout version {version} is not 2: upgrade the older side"):
        geometry_wire.from_message(message)


def test_a_message_that_names_no_layer_or_split_is_refused() -> None:
    message = geometry_wire.to_message(GEOMETRY)
    message.layer_indices[1] = 7
    with pytest.raises(ImageError, match="layer description 7 does not exist: there are 4"):
        geometry_wire.from_message(message)

    message = geometry_wire.to_message(GEOMETRY)
    message.distinct_layers[0].projections[0].split = adapter_pb2.Projection.SPLIT_UNSPECIFIED
    with pytest.raises(ImageError, match=r"projection 'attn.qkv_proj': split 0 is none that this version knows"):
        geometry_wire.from_message(message)


def wire_layers(num_projections: int, *, op: str) -> adapter_pb2.Geometry:
    """Return a message of one layer; ``op`` is formatted with each projection's number."""
    message = adapter_pb2.Geometry(layout_version=2, dtype="float32", page_bytes=4096, layer_indices=[0])
    layer = message.distinct_layers.add()
    for index in range(num_projections):
        split = adapter_pb2.Projection.SPLIT_OUTPUTS
        layer.projections.add(path=f"p{index}", op=op.format(index), in_features=8, out_features=8, split=split)
    return message


def test_a_message_larger_than_any_model_is_refused_before_it_is_read() -> None:
    many = [0] * (geometry_wire.MAX_LAYERS + 1)
    layers = adapter_pb2.Geometry(layout_version=2, dtype="float32", page_bytes=4096, layer_indices=many)
    layers.distinct_layers.add()
    with pytest.raises(ImageError, match="4097 decoder layers exceed the 4096"):
        geometry_wire.from_message(layers)

    empty = [adapter_pb2.DecoderLayer() for _ in many]
    described = adapter_pb2.Geometry(layout_version=2, dtype="float32", page_bytes=4096, distinct_layers=empty)
    with pytest.raises(ImageError, match="4097 layer descriptions exceed the 4096"):
        geometry_wire.from_message(described)

    with pytest.raises(ImageError, match="4097 projections exceed the 4096"):
        geometry_wire.from_message(wire_layers(geometry_wire.MAX_PROJECTIONS + 1, op="one"))


@pytest.mark.parametrize("op", ["one", "op {}"])
def test_reading_the_largest_message_costs_little(op: str) -> None:
    message = wire_layers(geometry_wire.MAX_PROJECTIONS, op=op)
    began_s = time.process_time()

    geometry = geometry_wire.from_message(message)

    assert time.process_time() - began_s < 2, "it takes some 0.1 s; 10 s if the work grows with the number's square"
    assert geometry.place(0, "p4095")[0] == len(geometry.ops) - 1
