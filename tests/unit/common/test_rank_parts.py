"""What tensor-parallel ranks compute with adds up to what one rank computes: outputs side by side, partial sums as a sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.v1 import adapter_pb2
from loraplex_common import geometry_wire
from loraplex_common.adapter_image import Geometry, ImageError
from loraplex_common.adapter_parts import KINDS
from loraplex_common.projections import Projection, Section, Split, gated_decoder_layer, with_fused
from loraplex_common.sparse_delta import SPARSE_DELTA

LAYER = gated_decoder_layer(hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=4)
FUSED = with_fused(with_fused(LAYER, "qkv", "self_attn.qkv_proj"), "gate_up", "mlp.gate_up_proj")


def projection(layer: tuple[Projection, ...], name: str) -> Projection:
    return next(each for each in layer if each.name == name)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_ranks_hold_whole_heads_of_keys_and_share_those_that_are_fewer_than_they(degree: int) -> None:
    heads = [projection(LAYER, "k_proj").local_outputs(rank, degree) for rank in range(degree)]

    expected = {1: [(0, 8)], 2: [(0, 4), (4, 8)], 4: [(0, 4), (0, 4), (4, 8), (4, 8)]}[degree]
    assert heads == [(slice(*each),) for each in expected]


def test_a_fused_module_is_divided_section_by_section() -> None:
    qkv, gate_up = projection(FUSED, "qkv_proj"), projection(FUSED, "gate_up_proj")

    assert qkv.local_outputs(3, 4) == (slice(12, 16), slice(20, 24), slice(28, 32))
    assert qkv.local_shape(4) == (16, 12)
    assert gate_up.local_outputs(1, 2) == (slice(12, 24), slice(36, 48))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([projection(LAYER, "k_proj"), projection(LAYER, "o_proj"), *FUSED]),
    st.sampled_from([2, 4]),
    st.integers(1, 60),
    st.integers(0, 2**16),
)
def test_a_sparse_delta_of_ranks_is_the_whole_one(each: Projection, degree: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = np.zeros((each.out_features, each.in_features), dtype=np.float32)
    places = np.sort(rng.choice(dense.size, count, replace=False))
    dense.flat[places] = rng.standard_normal(count)
    rows, columns = np.divmod(places, each.in_features)
    starts = np.searchsorted(rows, np.arange(each.out_features + 1)).astype(np.int32)
    arrays = (dense.flat[places], columns.astype(np.int32), starts)

    found = np.zeros_like(dense)
    for rank in range(degree):
        values, local_columns, ends = KINDS[SPARSE_DELTA].local(each, arrays, rank, degree)
        width, outputs = each.local_shape(degree)
        assert (len(values), len(local_columns), len(ends), ends[-1]) == (count, count, outputs + 1, count)
        own = np.zeros((outputs, width), dtype=np.float32)
        for n in range(outputs):
            np.add.at(own[n], local_columns[ends[n] : ends[n + 1]], values[ends[n] : ends[n + 1]])
        if each.split is Split.INPUTS:
            found[:, rank * width : (rank + 1) * width] = own
        else:
            indices = np.concatenate([np.arange(each.out_features)[part] for part in each.local_outputs(rank, degree)])
            found[indices] = own
    np.testing.assert_array_equal(found, dense)


@pytest.mark.parametrize("layer", [LAYER, FUSED])
def test_sections_travel_and_are_left_out_where_nothing_is_divided(layer: tuple[Projection, ...]) -> None:
    divided = Geometry.of([layer], dtype="float32", page_bytes=4096, tp_degree=4)
    whole = Geometry.of([layer], dtype="float32", page_bytes=4096)

    assert geometry_wire.from_message(geometry_wire.to_message(divided)) == divided
    message = geometry_wire.to_message(whole)
    assert not any(each.sections for each in message.distinct_layers[0].projections)
    assert {each.split for each in geometry_wire.to_message(divided).distinct_layers[0].projections} >= {
        adapter_pb2.Projection.SPLIT_SECTIONS
    }


@pytest.mark.parametrize(
    "sections",
    [(Section(4, 2),), (Section(8, 3),), (Section(7), Section(1)), (Section(2**31, 1), Section(8))],
)
def test_sections_that_make_no_sense_are_refused(sections: tuple[Section, ...]) -> None:
    layer = (replace(projection(LAYER, "k_proj"), sections=sections),)

    with pytest.raises(ImageError, match=r"sections of other|cannot be split over tp_degree 4"):
        Geometry.of([layer], dtype="float32", page_bytes=4096, tp_degree=4)


def test_more_sections_than_any_model_has_are_not_read() -> None:
    message = geometry_wire.to_message(Geometry.of([FUSED], dtype="float32", page_bytes=4096, tp_degree=2))
    message.distinct_layers[0].projections[0].sections.extend([adapter_pb2.Projection.Section(width=1)] * 20)

    with pytest.raises(ImageError, match="sections exceed"):
        geometry_wire.from_message(message)
