"""DoRA's factors are computed once from the engine's own weights, and written where the image left their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loraplex_common.adapter_image import AdapterSpec, Geometry, ModuleSpec, Tensors
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.vectors import OUT_VECTOR, OutVector
from loraplex_engine.model.layers import Dense
from loraplex_engine.runners.torch.factors import FactorWriter, KeptFactors, row_norms
from loraplex_engine.runners.torch.parts import make_lora_step
from loraplex_engine.runners.torch.segment import Segment
from support.adapter_algebra import DORA, random_adapter
from support.torch_products import DTYPES, PLACES, Base, Pool, make_base, make_geometry, project

if TYPE_CHECKING:
    from loraplex_engine.runners.torch.adapter_table import AdapterTable


def dora_adapter(base: Base, seed: int = 3) -> tuple[AdapterSpec, Tensors]:
    wanted = {(layer, name): [LOW_RANK, DORA] for layer, name in PLACES}
    return random_adapter(base.geometry, wanted, base.weights, seed)


def written_factors(table: AdapterTable) -> list[torch.Tensor]:
    return [torch.cat([tile.values for tile in each.tiles]).clone() for each in table.magnitudes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_are_magnitudes_over_the_norms_of_the_adapted_rows_with_their_sign(dtype: str) -> None:
    base = make_base(make_geometry(dtype), biased=False)
    spec, tensors = dora_adapter(base)

    table = Pool(base.geometry, 400).load(spec, tensors, FactorWriter(base.linears))

    assert len(table.magnitudes) == len(PLACES)
    for module, found in zip(spec.modules, written_in_order(table, spec, base.geometry), strict=True):
        key = (module.layer, module.projection)
        a, b = (torch.from_numpy(each).to(DTYPES[dtype]).double().numpy() for each in tensors[*key, LOW_RANK])
        adapted = base.weights[key].astype(np.float64) + module.scaling * (b @ a)
        magnitudes = tensors[*key, OUT_VECTOR][0]
        np.testing.assert_allclose(found, magnitudes / np.linalg.norm(adapted, axis=1), rtol=2e-6)
        assert (np.sign(found.numpy()) == np.sign(magnitudes)).all()


def written_in_order(table: AdapterTable, spec: AdapterSpec, geometry: Geometry) -> list[torch.Tensor]:
    by_place = {
        (each.layer, each.op, each.first): written_factors(table)[at] for at, each in enumerate(table.magnitudes)
    }
    found = []
    for module in spec.modules:
        op, index = geometry.place(module.layer, module.projection)
        first = sum(geometry.ops[op].local_outputs(1)[:index])
        found.append(by_place[module.layer, geometry.ops[op].name, first])
    return found


def test_a_row_of_zeros_gets_a_finite_factor_and_stays_zero() -> None:
    base = make_base(make_geometry("float32"), biased=False)
    base.linears[1]["down"].weight[5] = 0
    spec, tensors = random_adapter(base.geometry, {(1, "down_proj"): [LOW_RANK, DORA]}, base.weights, 0)
    tensors[1, "down_proj", LOW_RANK][1][5] = 0
    table = Pool(base.geometry, 100).load(spec, tensors, FactorWriter(base.linears))
    segment = Segment(first=0, last=2, table=table, scales=None)

    y = project(base, make_lora_step([[segment]], torch.float32), 1, "down", torch.randn(2, 160), feature_major=False)

    assert torch.isfinite(y).all()
    assert (y[:, 5] == 0).all()


def test_norms_keep_their_digits_where_the_delta_nearly_cancels_a_row() -> None:
    weight = torch.randn(40, 96)
    a, b = torch.randn(1, 96), torch.randn(40, 1)
    weight[7] = -0.5 * b[7] @ a + 1e-5 * torch.randn(96)

    found = row_norms(Dense(weight), 0, 40, (a, b, 0.5))

    direct = torch.linalg.vector_norm(weight.double() + 0.5 * b.double() @ a.double(), dim=1)
    torch.testing.assert_close(found.double(), direct, rtol=2e-2, atol=0)  # 1e-5 is some 100 ulp of the weight
    rest = torch.arange(40) != 7
    torch.testing.assert_close(found.double()[rest], direct[rest], rtol=1e-6, atol=0)


class CountingDense(Dense):
    """Counts how often rows are read."""

    num_reads = 0

    def rows(self, first: int, last: int) -> torch.Tensor:
        CountingDense.num_reads += 1
        return super().rows(first, last)


def test_an_adapter_that_comes_back_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountingDense, "num_reads", 0)
    base = make_base(make_geometry("float32"), biased=False)
    linears = [{op: CountingDense(each.weight) for op, each in layer.items()} for layer in base.linears]
    spec, tensors = dora_adapter(base)
    pool, writer = Pool(base.geometry, 1000), FactorWriter(linears)

    first = written_factors(pool.load(spec, tensors, writer))
    num_reads = CountingDense.num_reads
    second = written_factors(pool.load(spec, tensors, writer))

    assert num_reads >= len(PLACES)
    assert CountingDense.num_reads == num_reads
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_kept_factors_stay_within_their_bytes_and_the_least_used_ones_go() -> None:
    kept = KeptFactors(max_bytes=100)
    kept.put("a", torch.zeros(10))
    kept.put("b", torch.zeros(10))
    assert kept.get("a") is not None
    kept.put("c", torch.zeros(10))
    kept.put("too large", torch.zeros(26))

    assert ("a" in kept, "b" in kept, "c" in kept, "too large" in kept) == (True, False, True, False)
    assert kept.num_bytes == 80


def test_magnitudes_without_a_pair_are_divided_by_the_norms_of_the_base() -> None:
    base = make_base(make_geometry("float32"), biased=False)
    values = np.linspace(-1, 1, 32, dtype=np.float32)
    spec = AdapterSpec("ab" * 32, (ModuleSpec(0, "k_proj", (OutVector(is_magnitude=True),)),))

    table = Pool(base.geometry, 10).load(spec, {(0, "k_proj", OUT_VECTOR): (values,)}, FactorWriter(base.linears))

    expected = values / np.linalg.norm(base.weights[0, "k_proj"], axis=1)
    np.testing.assert_allclose(written_factors(table)[0], expected, rtol=1e-6)
