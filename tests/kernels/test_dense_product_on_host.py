"""Products of few rows with bf16 weights, on the CPU, with tensor cores emulated; copies land in a random order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.fp8_product_cases import DenseNumbers, ProductCase
from kernels.host_kernels import HostLibrary, host_byte_map
from kernels.kernel_cases import relative_error
from loraplex_engine.runners.cuda import few_row_dense
from loraplex_engine.runners.cuda.few_row_dense import DenseGateProducts, DenseProducts, FewRowDense
from loraplex_engine.runners.cuda.linears import CublasDense
from loraplex_kernels.pointwise.silu_mul import GeluMul, SiluMul
from loraplex_kernels.products import dense_product
from loraplex_kernels.products.dense_product import DenseProduct
from loraplex_kernels.products.fp8_cut import Cut

if TYPE_CHECKING:
    from kernels.conftest import MakeHostLibrary

CPU = torch.device("cpu")
TOLERANCE = 4e-3  # of rounding the result to bf16


@pytest.fixture
def library(host_library: MakeHostLibrary, monkeypatch: pytest.MonkeyPatch) -> HostLibrary:
    monkeypatch.setattr(dense_product, "byte_map", host_byte_map)
    monkeypatch.setattr(HostLibrary, "num_multiprocessors", 1)  # for which 192 outputs are wide
    made = host_library(torch.bfloat16)
    monkeypatch.setattr(few_row_dense, "ARCH", made.arch)
    return made


def cut_of(rows: int, *, warpgroups: int = 1, parts: int = 1, cluster: int = 1, stages: int = 6) -> Cut:
    return Cut(rows=rows, warpgroups=warpgroups, parts=parts, cluster=cluster, stages=stages, ctas=1)


def tracked(library: HostLibrary, case: ProductCase) -> DenseNumbers:
    numbers = DenseNumbers(case, CPU)
    library.track(numbers.x, numbers.weight)
    return numbers


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (ProductCase(rows=1, inputs=640, outputs=64), cut_of(8, stages=3)),
        (ProductCase(rows=5, inputs=648, outputs=72, has_bias=True), cut_of(8, parts=2, stages=4)),
        (ProductCase(rows=8, inputs=320, outputs=136, accumulates=True), cut_of(8, parts=2, cluster=2, stages=2)),
        (ProductCase(rows=13, inputs=256, outputs=128), cut_of(16, warpgroups=2, cluster=2)),
        (ProductCase(rows=2, inputs=8, outputs=8), cut_of(8, parts=2, cluster=2)),
    ],
    ids=lambda value: None if isinstance(value, ProductCase) else "",
)
def test_a_product_is_fp32s_however_it_is_cut(library: HostLibrary, case: ProductCase, cut: Cut) -> None:
    numbers = tracked(library, case)

    assert relative_error(numbers.launched(library, cut), numbers.expected()) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "cut", "gate"),
    [
        (ProductCase(rows=5, inputs=648, outputs=272, has_bias=True), cut_of(8, warpgroups=2), SiluMul),
        (ProductCase(rows=8, inputs=320, outputs=128), cut_of(8, warpgroups=2, parts=2, cluster=2, stages=2), GeluMul),
        (ProductCase(rows=13, inputs=128, outputs=528), cut_of(16, warpgroups=4), SiluMul),
    ],
    ids=["bias", "cluster", "four warpgroups"],
)
def test_a_gates_product_is_the_product_and_then_the_gate(
    library: HostLibrary, case: ProductCase, cut: Cut, gate: type[SiluMul]
) -> None:
    numbers = tracked(library, case)

    assert torch.equal(numbers.gated(library, cut, gate), numbers.gated_apart(library, cut, gate))


def test_a_product_that_a_kernel_cannot_compute_is_refused(library: HostLibrary) -> None:
    numbers = tracked(library, ProductCase(rows=9, inputs=64, outputs=128))
    with pytest.raises(ValueError, match="9 rows in a kernel of 8"):
        numbers.launched(library, cut_of(8))
    with pytest.raises(ValueError, match="1 warpgroups cannot compute gate and up"):
        DenseProduct(library, cut_of(8), gate=())
    product = DenseProduct(library, cut_of(16, warpgroups=2), gate=SiluMul.macros)
    with pytest.raises(ValueError, match="not added to anything"):
        numbers._launch(product, numbers.before[:, :64].contiguous(), accumulates=True)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_cublass_whoever_multiplies(library: HostLibrary, has_bias: bool) -> None:
    numbers = tracked(library, ProductCase(rows=3, inputs=64, outputs=200, has_bias=has_bias))
    own = FewRowDense(DenseProducts(library), numbers.weight, numbers.bias)
    other = CublasDense(numbers.weight, numbers.bias)
    assert own.few_rows is not None
    for method in ("multiply", "into", "onto"):
        found, expected = numbers.before.clone(), numbers.before.clone()

        getattr(own, method)(numbers.x, found)
        getattr(other, method)(numbers.x, expected)

        assert relative_error(found, expected.float()) < 2 * TOLERANCE, method


def test_rows_that_are_many_or_not_next_to_each_other_are_cublass(library: HostLibrary) -> None:
    numbers = tracked(library, ProductCase(rows=33, inputs=64, outputs=200))
    linear = FewRowDense(DenseProducts(library), numbers.weight)
    rows = linear.few_rows
    assert rows is not None
    wide = torch.zeros(3, 208, dtype=torch.bfloat16)

    assert not rows.launch(numbers.x, numbers.before, bias=None)
    assert not rows.launch(numbers.x[::2][:3], numbers.before[:3], bias=None)
    assert not rows.launch(numbers.x[:3], wide[:, :200], bias=None)
    assert not rows.launch(numbers.x[:0], numbers.before[:0], bias=None)
    linear.into(numbers.x[:3], wide[:, :200])

    assert relative_error(wide[:, :200], numbers.expected()[:3]) < TOLERANCE
    assert not wide[:, 200:].any()


@pytest.mark.parametrize(("inputs", "outputs"), [(60, 64), (64, 60), (8, few_row_dense.MAX_OUTPUTS + 8)])
def test_a_weight_that_boxes_do_not_fit_or_that_is_a_vocabularys_is_cublass(
    library: HostLibrary, inputs: int, outputs: int
) -> None:
    weight = torch.zeros(outputs, inputs, dtype=torch.bfloat16)

    assert DenseProducts(library).of(weight) is None
    assert DenseProducts(library).of(weight.float()) is None


def test_a_layers_gate_is_in_its_product_where_there_is_a_kernel(library: HostLibrary) -> None:
    numbers = tracked(library, ProductCase(rows=3, inputs=64, outputs=272, has_bias=True))
    narrow = tracked(library, ProductCase(rows=3, inputs=64, outputs=64))
    products = DenseProducts(library)
    layers = [FewRowDense(products, numbers.weight, numbers.bias), FewRowDense(products, narrow.weight)]
    gates = DenseGateProducts([*layers, CublasDense(narrow.weight)], SiluMul.macros)
    scratch, out = torch.zeros_like(numbers.before), torch.zeros(3, 136, dtype=torch.bfloat16)
    product, expected = torch.zeros_like(scratch), torch.zeros_like(out)
    layers[0].into(numbers.x, product)
    SiluMul(library, 136).launch(product, expected)

    assert gates.launch(0, layers[0], numbers.x, scratch, out)
    assert torch.equal(out, expected)
    for layer in (1, 2):
        assert not gates.launch(layer, layers[1], narrow.x, narrow.before, narrow.before[:, :32].contiguous())


def test_maps_of_inputs_that_are_anywhere_do_not_pile_up(library: HostLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_row_dense, "MAX_MAPS", 2)
    numbers = tracked(library, ProductCase(rows=5, inputs=64, outputs=200))
    products = DenseProducts(library)
    rows = products.of(numbers.weight)
    assert rows is not None
    for count in range(1, 6):
        y = torch.zeros(count, 200, dtype=torch.bfloat16)

        assert rows.launch(numbers.x[:count], y, bias=None)

        assert relative_error(y, numbers.expected()[:count]) < TOLERANCE
        assert len(products._maps) <= 2
