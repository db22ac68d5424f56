"""FLoRA's tensors go into images and come out of them; a rank that costs too much is refused."""

from __future__ import annotations

import numpy as np
import pytest
from loraplex_common.adapter_image import AdapterSpec, Geometry, ImageError, ModuleSpec, layout, pack, tile_values
from loraplex_common.adapter_parts import KINDS
from loraplex_common.flora import FLORA, KIND_FLORA_A, KIND_FLORA_B, Flora, FloraKind
from loraplex_common.low_rank import LowRank
from support.decoder_shapes import decoder_geometry


def geometry(*, dtype: str = "float32", tp_degree: int = 1) -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=16 * 1024,
        num_layers=2,
        hidden_size=1024,
        intermediate_size=2048,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        tp_degree=tp_degree,
    )


SPEC = AdapterSpec(
    "ab" * 32,
    (
        ModuleSpec(0, "k_proj", (Flora(3),)),
        ModuleSpec(0, "v_proj", (LowRank(4, 1.0), Flora(8))),
        ModuleSpec(1, "down_proj", (Flora(5),)),
    ),
)


def tensors_of(spec: AdapterSpec) -> dict[tuple[int, str, str], tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(0)
    return {
        (layer, name, kind): tuple(
            rng.standard_normal(shape, dtype=np.float32)
            for shape in KINDS[kind].shapes(geometry().projection(layer, name), size).values()
        )
        for layer, name, kind, size in spec.sizes
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_slices_factors_read_back_exactly_in_images_of_either_dtype(dtype: str) -> None:
    tensors = tensors_of(SPEC)
    image = pack(geometry(dtype=dtype), SPEC, tensors)

    read: dict[tuple[int, int, int], list[np.ndarray]] = {}
    for tile in layout(geometry(dtype=dtype), SPEC.sizes).tiles:
        key = (int(tile["layer"]), int(tile["kind"]), int(tile["slice"]))
        read.setdefault(key, []).append(tile_values(geometry(dtype=dtype), image, tile))

    for layer, name, index in ((0, "k_proj", 1), (0, "v_proj", 2), (1, "down_proj", 0)):
        a, b = tensors[layer, name, FLORA]
        np.testing.assert_array_equal(np.concatenate(read[layer, KIND_FLORA_A, index], axis=1), a)
        np.testing.assert_array_equal(np.concatenate(read[layer, KIND_FLORA_B, index], axis=1), b.T)
    assert len(read[0, KIND_FLORA_A, 2]) > 1, "one tile holds A: the case is too easy"


def test_partial_products_of_tensor_parallel_ranks_add_up_or_lie_side_by_side() -> None:
    kind, rng = FloraKind(), np.random.default_rng(1)
    for name in ("v_proj", "down_proj"):
        projection = geometry(tp_degree=2).projection(0, name)
        a, b = (rng.standard_normal(shape) for shape in kind.shapes(projection, 2).values())
        weight, x = rng.standard_normal((len(b), a.shape[1])), rng.standard_normal((a.shape[1],))
        columns, outputs = projection.local_shape(2)
        parts = []
        for rank in range(2):
            own_a, own_b = kind.local(projection, (a, b), rank, 2)
            if name == "down_proj":
                at = np.s_[:, rank * columns : (rank + 1) * columns]
                parts.append((weight[at] * (own_b @ own_a)) @ x[rank * columns : (rank + 1) * columns])
            else:
                parts.append((weight[rank * outputs : (rank + 1) * outputs] * (own_b @ own_a)) @ x)

        whole = (weight * (b @ a)) @ x

        np.testing.assert_allclose(sum(parts) if name == "down_proj" else np.concatenate(parts), whole, rtol=1e-12)


def test_a_rank_above_eight_is_refused_with_the_remedy() -> None:
    spec = AdapterSpec("ab" * 32, (ModuleSpec(1, "q_proj", (Flora(9),)),))

    with pytest.raises(
        ImageError, match=r"layer 1 q_proj: FLoRA of rank 9: .* at most 8 are served: train with a smaller"
    ):
        layout(geometry(), spec.sizes)


def test_a_spec_with_flora_survives_json() -> None:
    assert AdapterSpec.from_json(SPEC.to_json()) == SPEC
