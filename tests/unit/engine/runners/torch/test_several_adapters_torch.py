"""Rows that add several adapters up equal the weighted sum of what each of them adds, in any mix of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS
from loraplex_engine.runners.torch.factors import FactorWriter
from loraplex_engine.runners.torch.lora import LoraStep
from loraplex_engine.runners.torch.parts import make_lora_step
from loraplex_engine.runners.torch.segments import cut_segments, order_rows, used_adapters
from loraplex_engine.step import NO_ADAPTER
from support.adapter_algebra import in_dtype, module_output, random_adapter
from support.decoder_shapes import OPS
from support.fake_adapters import fake_pool
from support.fake_runner import FakeRunner
from support.plans import Harness, Sequence_
from support.torch_products import DTYPES, NUM_LAYERS, PLACES, Base, Pool, make_base, make_geometry, project

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.adapter_image import AdapterSpec, Tensors
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray

NUM_ADAPTERS = 4
CPU = torch.device("cpu")
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0, 100.0])
LISTS = st.lists(st.tuples(st.integers(0, NUM_ADAPTERS - 1), WEIGHTS), max_size=4, unique_by=lambda term: term[0])
PARTS = st.dictionaries(
    st.sampled_from(PLACES),
    st.sets(st.sampled_from([LOW_RANK, BIAS, SPARSE_DELTA]), min_size=1).map(sorted),
    min_size=1,
)
Adapter = tuple["AdapterSpec", "Tensors"]


def make_plan(rows: Sequence[tuple[list[tuple[int, float]], int]]) -> StepPlan:
    """Return a plan of rows with these adapters and so many prompt tokens each."""
    sequences = []
    for slot, (terms, length) in enumerate(rows):
        (index, scale), *more = terms or [(NO_ADAPTER, 1.0)]
        sequences.append(Sequence_(slot=slot, prompt=[1] * length, adapter=index, scale=scale, more=more))
    runner = FakeRunner(num_pages=100, page_bytes=64, block_tokens=4)
    return Harness(runner, fake_pool(4, 64), 100).plan(sequences)


def expected_row(
    base: Base, made: Sequence[Adapter], terms: list[tuple[int, float]], layer: int, op: str, x: torch.Tensor
) -> NDArray[np.float64]:
    outputs = []
    for name in OPS[op]:
        weight, bias = base.weights[layer, name], base.biases[layer, name]
        row = x.double().numpy()
        plain = module_output((), {}, weight, bias, row)
        total = plain.copy()
        for index, scale in terms:
            spec, tensors = made[index]
            parts = next((m.parts for m in spec.modules if (m.layer, m.projection) == (layer, name)), ())
            own = {part.kind: tensors[layer, name, part.kind] for part in parts}
            total += module_output(parts, own, weight, bias, row, scale=scale, dtype=base.geometry.dtype) - plain
        outputs.append(total)
    return np.concatenate(outputs, axis=1)


@given(
    adapters=st.lists(PARTS, min_size=NUM_ADAPTERS, max_size=NUM_ADAPTERS),
    rows=st.lists(st.tuples(LISTS, st.integers(1, 4)), min_size=1, max_size=8),
    biased=st.booleans(),
    feature_major=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_any_mix_of_lists_equals_the_weighted_sum_and_leaves_the_bases_rows_alone(
    adapters: list[dict[tuple[int, str], list[str]]],
    rows: list[tuple[list[tuple[int, float]], int]],
    *,
    biased: bool,
    feature_major: bool,
    seed: int,
) -> None:
    base = make_base(make_geometry("float32"), biased=biased, seed=seed)
    made = [random_adapter(base.geometry, wanted, base.weights, seed + at) for at, wanted in enumerate(adapters)]
    pool, writer = Pool(base.geometry, 4000), FactorWriter(base.linears)
    tables = dict(enumerate(pool.load(spec, tensors, writer) for spec, tensors in made))
    plan = make_plan(rows)
    order = order_rows(plan)
    assert used_adapters(plan) == sorted({index for terms, _ in rows for index, _ in terms})
    of_token = [rows[row][0] for row in order.tolist() for _ in range(rows[row][1])]
    with torch.inference_mode():
        for layer in range(NUM_LAYERS):
            for op in OPS:
                x = torch.randn(len(of_token), base.linears[layer][op].in_features)
                step = make_lora_step(cut_segments(plan, order, tables, CPU), torch.float32)
                y = project(base, step, layer, op, x, feature_major=feature_major)
                plain = project(base, LoraStep([], torch.float32), layer, op, x, feature_major=feature_major)

                for at, terms in enumerate(of_token):
                    if not terms:
                        assert torch.equal(y[at], plain[at]), "a row of the base changed"
                        continue
                    expected = expected_row(base, made, terms, layer, op, x[at : at + 1])
                    error = np.abs(y[at : at + 1].double().numpy() - expected).max()
                    assert error <= 2e-5 * np.abs(expected).max(), (layer, op, terms)


def test_rows_of_equal_lists_are_computed_together_and_a_list_of_one_is_its_adapters_row() -> None:
    both, swapped = [(0, 1.0), (1, 0.5)], [(1, 1.0), (0, 0.5)]
    plan = make_plan([(both, 2), ([], 1), ([(0, 1.0)], 1), (both, 1), (swapped, 1), ([(0, 2.0)], 3)])

    order = order_rows(plan)

    adapters = plan.adapters[order].tolist()
    assert (adapters, order.tolist()) == ([-1, 0, 0, 0, 0, 1], [1, 2, 5, 0, 3, 4])


def test_in_bf16_the_sum_is_rounded_once() -> None:
    base = make_base(make_geometry("bfloat16"), biased=False)
    wanted = {(0, name): [LOW_RANK] for name in OPS["qkv"]}
    made = [random_adapter(base.geometry, wanted, base.weights, at) for at in range(NUM_ADAPTERS)]
    pool, writer = Pool(base.geometry, 400), FactorWriter(base.linears)
    tables = dict(enumerate(pool.load(spec, tensors, writer) for spec, tensors in made))
    terms = [(index, 1.5) for index in range(NUM_ADAPTERS)]
    plan = make_plan([(terms, 12)])
    x = torch.randn(12, 96).to(DTYPES["bfloat16"])

    with torch.inference_mode():
        step = make_lora_step(cut_segments(plan, order_rows(plan), tables, CPU), DTYPES["bfloat16"])
        y = project(base, step, 0, "qkv", x, feature_major=False)
        plain = project(base, LoraStep([], DTYPES["bfloat16"]), 0, "qkv", x, feature_major=False)

    exact = plain.double().numpy()
    begin = 0
    for name in OPS["qkv"]:
        end = begin + len(base.weights[0, name])
        for spec, tensors in made:
            part = next(module.pair for module in spec.modules if module.projection == name)
            assert part is not None
            a, b = (in_dtype(each, "bfloat16") for each in tensors[0, name, LOW_RANK])
            exact[:, begin:end] += 1.5 * part.scaling * (x.double().numpy() @ a.T) @ b.T
        begin = end
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert (np.abs(y.double().numpy() - exact) <= 1.02 * half_ulp + 1e-5).all()
