"""Products of few rows with FP8 weights, on the CPU: boxes, ring, clusters and the order of sums, with tensor cores emulated.

Copies land in a random order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.fp8_cases import assert_equal, new_rows
from kernels.fp8_product_cases import ProductCase, ProductNumbers, maxima_of
from kernels.host_kernels import HostLibrary, host_byte_map
from kernels.kernel_cases import relative_error
from loraplex_kernels.pointwise.fp8 import QuantiseFp8
from loraplex_kernels.pointwise.silu_mul import GeluMul, SiluMul
from loraplex_kernels.products import fp8_product
from loraplex_kernels.products.fp8_cut import Cut
from loraplex_kernels.products.fp8_product import Fp8Product

if TYPE_CHECKING:
    from kernels.conftest import MakeHostLibrary

CPU = torch.device("cpu")
TOLERANCE = 4e-3  # of rounding the result to bf16


@pytest.fixture
def library(host_library: MakeHostLibrary, monkeypatch: pytest.MonkeyPatch) -> HostLibrary:
    monkeypatch.setattr(fp8_product, "byte_map", host_byte_map)
    return host_library(torch.bfloat16)


def launched(library: HostLibrary, numbers: ProductNumbers, cut: Cut) -> torch.Tensor:
    library.track(numbers.x, numbers.weight)
    return numbers.launched(library, cut)


def cut_of(rows: int, *, warpgroups: int = 1, parts: int = 1, cluster: int = 1, stages: int = 6) -> Cut:
    return Cut(rows=rows, warpgroups=warpgroups, parts=parts, cluster=cluster, stages=stages, ctas=1)


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (ProductCase(rows=1, inputs=1280, outputs=64), cut_of(8, stages=3)),
        (ProductCase(rows=5, inputs=1296, outputs=72, has_bias=True), cut_of(8, parts=2, stages=4)),
        (ProductCase(rows=8, inputs=640, outputs=136, accumulates=True), cut_of(8, parts=2, cluster=2, stages=2)),
        (ProductCase(rows=13, inputs=512, outputs=128), cut_of(16, warpgroups=2, cluster=2)),
        (ProductCase(rows=8, inputs=128, outputs=64), cut_of(8, parts=2, cluster=2)),
        (ProductCase(rows=3, inputs=1296, outputs=200, has_groups=True), cut_of(8, warpgroups=2, parts=2)),
        (ProductCase(rows=2, inputs=5120, outputs=64, has_groups=True, accumulates=True), cut_of(8, parts=3, stages=3)),
    ],
    ids=lambda value: None if isinstance(value, ProductCase) else "",
)
def test_a_product_is_fp32s_however_it_is_cut(library: HostLibrary, case: ProductCase, cut: Cut) -> None:
    numbers = ProductNumbers(case, CPU)

    assert relative_error(launched(library, numbers, cut), numbers.expected()) < TOLERANCE


@pytest.mark.slow
def test_more_than_64_rows_are_two_passes(library: HostLibrary) -> None:
    numbers = ProductNumbers(ProductCase(rows=70, inputs=256, outputs=64), CPU)

    assert relative_error(launched(library, numbers, cut_of(128)), numbers.expected()) < TOLERANCE


def test_a_rows_result_depends_neither_on_other_rows_nor_on_the_kernels_rows(library: HostLibrary) -> None:
    numbers = ProductNumbers(ProductCase(rows=9, inputs=640, outputs=64), CPU)
    many = launched(library, numbers, cut_of(16, parts=2, cluster=2))
    numbers.x[8:] = numbers.x[0]
    numbers.x[1:8] = numbers.x[7]

    again = launched(library, numbers, cut_of(16, parts=2, cluster=2))
    numbers.case = ProductCase(rows=8, inputs=640, outputs=64)
    numbers.x, numbers.before = numbers.x[:8].clone(), numbers.before[:8].clone()
    numbers.x_scales = numbers.x_scales[:, :8].clone()
    few = launched(library, numbers, cut_of(8, parts=2, cluster=2, stages=2))

    assert torch.equal(again[0], many[0])
    assert torch.equal(few, again[:8])


def test_a_part_whose_slots_were_another_parts_before_is_refused() -> None:
    with pytest.raises(ValueError, match="3 stages are not a multiple of 2 parts"):
        cut_of(8, parts=2, stages=3)


def test_more_rows_than_the_kernels_are_refused(library: HostLibrary) -> None:
    with pytest.raises(ValueError, match="9 rows in a kernel of 8"):
        launched(library, ProductNumbers(ProductCase(rows=9, inputs=128, outputs=64), CPU), cut_of(8))


@pytest.mark.parametrize(
    ("case", "cut", "gate"),
    [
        (ProductCase(rows=5, inputs=1296, outputs=272, has_bias=True), cut_of(8, warpgroups=2), SiluMul),
        (ProductCase(rows=8, inputs=640, outputs=128), cut_of(8, warpgroups=2, parts=2, cluster=2, stages=2), GeluMul),
        (ProductCase(rows=13, inputs=256, outputs=528), cut_of(16, warpgroups=4), SiluMul),
        (ProductCase(rows=3, inputs=1296, outputs=768, has_groups=True), cut_of(8, warpgroups=2, parts=2), SiluMul),
    ],
    ids=["bias", "cluster", "four warpgroups", "groups"],
)
def test_a_gates_product_is_the_product_and_then_the_gate(
    library: HostLibrary, case: ProductCase, cut: Cut, gate: type[SiluMul]
) -> None:
    numbers = ProductNumbers(case, CPU)
    library.track(numbers.x, numbers.weight)

    y, maxima = numbers.gated(library, cut, gate)

    assert torch.equal(y, numbers.gated_apart(library, cut, gate))
    if maxima is not None:
        columns = 32 * cut.warpgroups
        assert torch.equal(maxima, maxima_of(y, columns))


@pytest.mark.parametrize("width", [64, 4104, 8192])
def test_rows_whose_maxima_are_known_are_quantised_as_others_are(library: HostLibrary, width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).to(torch.bfloat16)
    maxima = maxima_of(x, 64)
    rows = new_rows(width, CPU, has_groups=False)

    QuantiseFp8(library, width, has_groups=False, maxima=maxima.shape[1]).launch(x, rows, maxima=maxima)

    assert_equal(rows, x, has_groups=False)


def test_a_gates_product_that_a_cut_cannot_compute_is_refused(library: HostLibrary) -> None:
    with pytest.raises(ValueError, match="1 warpgroups cannot compute gate and up"):
        Fp8Product(library, cut_of(8), has_groups=False, gate=())
    numbers = ProductNumbers(ProductCase(rows=8, inputs=128, outputs=128), CPU)
    library.track(numbers.x, numbers.weight)
    product = Fp8Product(library, cut_of(8, warpgroups=2), has_groups=False, gate=())
    maps = product.input_map(numbers.x), numbers.x_scales, product.weight_map(numbers.weight), numbers.weight_scales
    y, maxima = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(8, 1)

    with pytest.raises(ValueError, match="writes maxima"):
        product.launch(*maps, y, inputs=128)
    with pytest.raises(ValueError, match="maxima of 7 rows, not of 8"):
        product.launch(*maps, y, inputs=128, maxima=maxima[:7])
    with pytest.raises(ValueError, match="not added to anything"):
        product.launch(*maps, y, inputs=128, maxima=maxima, accumulates=True)
    with pytest.raises(ValueError, match="a kernel of 0 maxima"):
        QuantiseFp8(library, 64, has_groups=False).launch(y, new_rows(64, CPU, has_groups=False), maxima=maxima)
