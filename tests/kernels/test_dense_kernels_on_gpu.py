"""Kernels of dense families that Llama does not need, on a GPU, at the sizes of real models too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.dense_cases import BRANCHES, FORMS, BranchCase, DenseCases, RopeCase
from kernels.gpu_tensors import DTYPES, TOLERANCE, libraries
from kernels.kernel_cases import relative_error
from loraplex_kernels.attention.rope_kv import RopeStyle

if TYPE_CHECKING:
    from kernels.dense_cases import Compared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
MORE_FORMS = {
    "Phi-4 mini": RopeCase(128, RopeStyle(rotary_dim=96), has_delta=True),
    "OLMo 2": RopeCase(128, RopeStyle(norms_whole=True), has_norm=True),
}
MORE_BRANCHES = {
    f"Gemma, rows of {hidden}": BranchCase(has_after=True, has_before=True, hidden=hidden, unit_offset=True)
    for hidden in (2560, 3840, 5376, 8192)
}


def check(compared: Compared, dtype: torch.dtype) -> None:
    for what, found, expected in compared:
        assert relative_error(found, expected) < 2 * TOLERANCE[dtype], what  # rounded twice on the way


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*FORMS.values(), *MORE_FORMS.values()], ids=[*FORMS, *MORE_FORMS])
def test_a_form_of_rope_is_the_references(case: RopeCase, dtype: torch.dtype) -> None:
    for library in libraries(dtype):
        check(DenseCases(library).rope(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*BRANCHES.values(), *MORE_BRANCHES.values()], ids=[*BRANCHES, *MORE_BRANCHES])
def test_a_branch_joins_the_residual_stream_and_the_next_norm_follows(case: BranchCase, dtype: torch.dtype) -> None:
    for library in libraries(dtype):
        check(DenseCases(library).branch(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_softcap(dtype: torch.dtype) -> None:
    for library in libraries(dtype):
        cases = DenseCases(library)
        check(cases.gelu_mul(), dtype)
        check(cases.softcap(640), dtype)
        check(cases.softcap(393), dtype)
