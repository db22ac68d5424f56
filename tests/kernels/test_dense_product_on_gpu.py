"""Products of few rows with bf16 weights on a GPU that has them, at the sizes of models and odd ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.fp8_product_cases import DenseNumbers, ProductCase
from kernels.gpu_tensors import TOLERANCE
from kernels.kernel_cases import relative_error
from loraplex_kernels.module import KernelLibrary, device_arch
from loraplex_kernels.pointwise.silu_mul import GeluMul, SiluMul
from loraplex_kernels.products.fp8_cut import choose_cuts

if TYPE_CHECKING:
    from loraplex_kernels.products.fp8_cut import Cut

HAS_KERNEL = torch.cuda.is_available() and device_arch(torch.device("cuda", 0)) == "sm_90a"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNEL, reason="no NVIDIA GPU of sm_90a")]

SIZES = ((4096, 6144), (4096, 28672), (14336, 4096), (2560, 20480), (10240, 2560), (2056, 4104), (72, 72))
ROWS = (1, 8, 9, 24, 64, 100)


def cut_for(library: KernelLibrary, case: ProductCase) -> Cut | None:
    cuts = choose_cuts(case.outputs, library.num_multiprocessors)
    return next((cut for cut in cuts if case.rows <= cut.rows), None)


@pytest.mark.parametrize("dependent", [False, True], ids=["in order", "dependent"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_product_is_fp32s(inputs: int, outputs: int, dependent: bool) -> None:
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=dependent)
    for rows in ROWS:
        for more in (False, True):
            case = ProductCase(rows=rows, inputs=inputs, outputs=outputs, has_bias=more, accumulates=more)
            cut = cut_for(library, case)
            if cut is None:
                continue
            numbers = DenseNumbers(case, library.device)
            assert relative_error(numbers.launched(library, cut), numbers.expected()) < TOLERANCE[torch.bfloat16], case


@pytest.mark.parametrize("gate", [SiluMul, GeluMul])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 28672), (2560, 20480), (1040, 20016)])
def test_a_gates_product_is_the_product_and_then_the_gate(inputs: int, outputs: int, gate: type[SiluMul]) -> None:
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=True, jitter=True)
    for rows in (1, 9, 24, 64):
        case = ProductCase(rows=rows, inputs=inputs, outputs=outputs, has_bias=rows == 9)
        numbers, cut = DenseNumbers(case, library.device), cut_for(library, case)
        assert cut is not None
        expected = numbers.gated_apart(library, cut, gate)

        for _ in range(5):
            assert torch.equal(numbers.gated(library, cut, gate), expected), case


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_rows_result_is_the_same_in_every_batch(inputs: int, outputs: int) -> None:
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=True, jitter=True)
    numbers = DenseNumbers(ProductCase(rows=64, inputs=inputs, outputs=outputs), library.device)
    cuts = choose_cuts(outputs, library.num_multiprocessors)
    many = numbers.launched(library, next(cut for cut in cuts if cut.rows == 64))
    numbers.x, numbers.before = numbers.x[:5].clone(), numbers.before[:5].clone()
    numbers.case = ProductCase(rows=5, inputs=inputs, outputs=outputs)

    for _ in range(20):
        assert torch.equal(numbers.launched(library, cuts[0]), many[:5])
