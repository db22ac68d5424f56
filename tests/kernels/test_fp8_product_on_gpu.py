"""Products of few rows with FP8 weights on a GPU that has them, at the sizes of Llama-3-8B and odd ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.fp8_cases import assert_equal, new_rows
from kernels.fp8_product_cases import ProductCase, ProductNumbers, maxima_of
from kernels.gpu_tensors import TOLERANCE
from kernels.kernel_cases import relative_error
from loraplex_kernels.module import KernelLibrary, device_arch
from loraplex_kernels.pointwise import fp8
from loraplex_kernels.pointwise.fp8 import QuantiseFp8
from loraplex_kernels.pointwise.silu_mul import GeluMul, SiluMul
from loraplex_kernels.products.fp8_cut import choose_cuts

if TYPE_CHECKING:
    from loraplex_kernels.products.fp8_cut import Cut

HAS_KERNEL = torch.cuda.is_available() and device_arch(torch.device("cuda", 0)) == "sm_90a"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNEL, reason="no NVIDIA GPU of sm_90a")]

LLAMA = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
ODD = ((4112, 4104), (144, 72), (128, 20000))
ROWS = (1, 8, 9, 24, 64, 100)


def cut_for(library: KernelLibrary, case: ProductCase) -> Cut | None:
    cuts = choose_cuts(case.outputs, library.num_multiprocessors)
    return next((cut for cut in cuts if case.rows <= cut.rows), None)


@pytest.mark.parametrize("dependent", [False, True], ids=["in order", "dependent"])
@pytest.mark.parametrize("has_groups", [False, True], ids=["outputs", "blocks"])
@pytest.mark.parametrize(("inputs", "outputs"), [*LLAMA, *ODD])
def test_a_product_is_fp32s(inputs: int, outputs: int, has_groups: bool, dependent: bool) -> None:
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=dependent)
    for rows in ROWS:
        for more in (False, True):
            case = ProductCase(
                rows=rows, inputs=inputs, outputs=outputs, has_groups=has_groups, has_bias=more, accumulates=more
            )
            cut = cut_for(library, case)
            if cut is None:
                continue
            numbers = ProductNumbers(case, library.device)
            assert relative_error(numbers.launched(library, cut), numbers.expected()) < TOLERANCE[torch.bfloat16], case


@pytest.mark.parametrize("gate", [SiluMul, GeluMul])
@pytest.mark.parametrize("has_groups", [False, True], ids=["outputs", "blocks"])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 28672), (2560, 20480), (1040, 20016)])
def test_a_gates_product_is_the_product_and_then_the_gate(
    inputs: int, outputs: int, has_groups: bool, gate: type[SiluMul]
) -> None:
    if has_groups and outputs % 256:
        outputs += 256 - outputs % 256
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=True, jitter=True)
    for rows in (1, 9, 24, 64):
        case = ProductCase(rows=rows, inputs=inputs, outputs=outputs, has_groups=has_groups, has_bias=rows == 9)
        numbers, cut = ProductNumbers(case, library.device), cut_for(library, case)
        assert cut is not None
        expected = numbers.gated_apart(library, cut, gate)

        for _ in range(5):
            y, maxima = numbers.gated(library, cut, gate)

            assert torch.equal(y, expected), case
            assert maxima is None or torch.equal(maxima, maxima_of(y, 32 * cut.warpgroups)), case


@pytest.mark.parametrize("vectors", [448, 100])
def test_rows_whose_maxima_are_known_are_quantised_as_others_are(vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "QUANTISE_VECTORS", vectors)
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=True)
    for rows, width in ((1, 14336), (64, 14336), (5, 10008)):
        x = torch.randn(rows, width, device=library.device, dtype=torch.bfloat16)
        maxima = maxima_of(x, 64).contiguous()
        known = new_rows(width, library.device, has_groups=False, room=72)

        QuantiseFp8(library, width, has_groups=False, maxima=maxima.shape[1]).launch(x, known, maxima=maxima)

        assert_equal(known, x, has_groups=False)


@pytest.mark.parametrize(("inputs", "outputs"), LLAMA)
def test_a_rows_result_is_the_same_in_every_batch(inputs: int, outputs: int) -> None:
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16, dependent=True, jitter=True)
    numbers = ProductNumbers(ProductCase(rows=64, inputs=inputs, outputs=outputs), library.device)
    cuts = choose_cuts(outputs, library.num_multiprocessors)
    many = numbers.launched(library, next(cut for cut in cuts if cut.rows == 64))
    numbers.x, numbers.x_scales = numbers.x[:8].clone(), numbers.x_scales[:, :8].clone()
    numbers.case, numbers.before = ProductCase(rows=5, inputs=inputs, outputs=outputs), numbers.before[:5].clone()

    for _ in range(20):
        assert torch.equal(numbers.launched(library, cuts[0]), many[:5])
