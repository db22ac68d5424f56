"""Every mix of kinds of parts in one batch equals the formula, and rows of others are what they are without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.flora import FLORA
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR
from loraplex_engine.runners.torch.factors import FactorWriter
from loraplex_engine.runners.torch.lora import LoraStep
from loraplex_engine.runners.torch.parts import PartsStep, make_lora_step
from loraplex_engine.runners.torch.segment import Segment
from support.adapter_algebra import DORA, IA3_OUT, module_output, random_adapter
from support.decoder_shapes import OPS
from support.torch_products import DTYPES, NUM_LAYERS, PLACES, Base, Pool, make_base, make_geometry, project

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.adapter_image import AdapterSpec, Tensors
    from loraplex_engine.runners.torch.adapter_table import AdapterTable

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}  # of the largest output of the row
FACTORS = st.sampled_from([None, DORA, IA3_OUT, OUT_VECTOR])


@st.composite
def wanted_parts(draw: st.DrawFn) -> dict[tuple[int, str], list[str]]:
    """Draw an adapter's parts; slices of one op scale their shared input alike or not at all."""
    wanted: dict[tuple[int, str], list[str]] = {}
    scaled = draw(st.sets(st.sampled_from([(layer, op) for layer in range(NUM_LAYERS) for op in OPS]), max_size=3))
    for layer, name in draw(st.sets(st.sampled_from(PLACES), min_size=1)):
        factor = draw(FACTORS)
        others = draw(st.sets(st.sampled_from([LOW_RANK, BIAS, SPARSE_DELTA, FLORA]), min_size=0 if factor else 1))
        wanted[layer, name] = [*sorted(others), *([factor] if factor else [])]
    for layer, op in scaled:
        for name in OPS[op]:
            wanted.setdefault((layer, name), []).append(IN_VECTOR)
    return wanted


@given(
    adapters=st.lists(wanted_parts(), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    biased=st.booleans(),
    feature_major=st.booleans(),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    page_bytes=st.sampled_from([4096, 65536]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_mix_of_kinds_equals_the_formula_and_leaves_the_bases_rows_alone(
    adapters: list[dict[tuple[int, str], list[str]]],
    lengths: Sequence[int],
    *,
    biased: bool,
    feature_major: bool,
    dtype: str,
    page_bytes: int,
    seed: int,
) -> None:
    base = make_base(make_geometry(dtype, page_bytes), biased=biased, seed=seed)
    made = [random_adapter(base.geometry, wanted, base.weights, seed + at) for at, wanted in enumerate(adapters)]
    pool, writer = Pool(base.geometry, 4000), FactorWriter(base.linears)
    tables = [pool.load(spec, tensors, writer) for spec, tensors in made]
    ends = np.cumsum(lengths)
    bounds = [(int(ends[at]), int(ends[at + 1])) for at in range(len(made))]  # the first rows have no adapter
    with torch.inference_mode():
        for layer in range(NUM_LAYERS):
            for op, names in OPS.items():
                x = torch.randn(ends[len(made)], base.linears[layer][op].in_features).to(DTYPES[dtype])
                segments = [
                    [Segment(first=first, last=last, table=table, scales=None)]
                    for (first, last), table in zip(bounds, tables, strict=True)
                ]
                step = make_lora_step(segments, DTYPES[dtype])
                y = project(base, step, layer, op, x, feature_major=feature_major)
                plain = project(base, LoraStep([], DTYPES[dtype]), layer, op, x, feature_major=feature_major)

                assert torch.equal(y[: ends[0]], plain[: ends[0]]), "rows of the base changed"
                for (spec, tensors), (first, last) in zip(made, bounds, strict=True):
                    expected = expected_rows(base, spec, tensors, layer, names, x[first:last])
                    error = np.abs(y[first:last].double().numpy() - expected).max(axis=1)
                    assert (error <= TOLERANCE[dtype] * np.abs(expected).max(axis=1)).all(), (layer, op, error)


def expected_rows(
    base: Base, spec: AdapterSpec, tensors: Tensors, layer: int, names: Sequence[str], x: torch.Tensor, scale: float = 1
) -> np.ndarray:
    parts = {module.projection: module.parts for module in spec.modules if module.layer == layer}
    return np.concatenate(
        [
            module_output(
                parts.get(name, ()),
                {part.kind: tensors[layer, name, part.kind] for part in parts.get(name, ())},
                base.weights[layer, name],
                base.biases[layer, name],
                x.double().numpy(),
                scale=scale,
                dtype=base.geometry.dtype,
            )
            for name in names
        ],
        axis=1,
    )


def test_a_requests_scale_multiplies_pairs_sparse_deltas_and_biases() -> None:
    base = make_base(make_geometry("float32"), biased=True)
    wanted = {(0, name): [LOW_RANK, SPARSE_DELTA, BIAS] for name in OPS["qkv"]}
    spec, tensors = random_adapter(base.geometry, wanted, base.weights, 1)
    table = Pool(base.geometry, 200).load(spec, tensors, FactorWriter(base.linears))
    x, scales = torch.randn(3, 96), [0.5, 0.0, 2.0]

    segment = Segment(first=0, last=3, table=table, scales=torch.tensor(scales))
    y = project(base, make_lora_step([[segment]], torch.float32), 0, "qkv", x, feature_major=False)

    for row, scale in enumerate(scales):
        expected = expected_rows(base, spec, tensors, 0, OPS["qkv"], x[row : row + 1], scale)
        np.testing.assert_allclose(y[row : row + 1], expected, atol=1e-4)


def test_a_step_of_pairs_alone_takes_the_plain_path() -> None:
    base = make_base(make_geometry("float32"), biased=False)
    pool, writer = Pool(base.geometry, 200), FactorWriter(base.linears)
    plain, other = (
        pool.load(*random_adapter(base.geometry, {(0, "q_proj"): parts}, base.weights, seed), writer)
        for seed, parts in enumerate(([LOW_RANK], [LOW_RANK, BIAS]))
    )

    def step(*tables: AdapterTable) -> LoraStep:
        segments = [[Segment(first=at, last=at + 1, table=table, scales=None)] for at, table in enumerate(tables)]
        return make_lora_step(segments, torch.float32)

    assert type(step(plain)) is LoraStep
    assert type(step(plain, other)) is PartsStep
