"""Kernels of dense families that Llama does not need, on the CPU under sanitizers: forms of RoPE, of norms, of the MLP, caps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
from kernels.dense_cases import BRANCHES, EPS, FORMS, Compared, DenseCases
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.rope_kv import RopeStyle
from loraplex_kernels.pointwise.branch_norm import BranchNorm
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from torch import Tensor

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
IN_FP32: Final = ("heads of 80, scaled queries", "no RoPE", "OLMo")


def dtype_of(name: str) -> torch.dtype:
    """One element type a case: compiling costs most."""
    return torch.float32 if name in IN_FP32 else torch.bfloat16


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def check(compared: Compared, dtype: torch.dtype) -> None:
    for what, found, expected in compared:
        assert relative_error(found, expected) < TOLERANCE[dtype], what


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_rope_is_the_references(host_library: MakeHostLibrary, name: str) -> None:
    dtype = dtype_of(name)

    check(DenseCases(host_library(dtype)).rope(FORMS[name]), dtype)


def test_a_rotary_dim_that_cuts_a_threads_dims_is_refused() -> None:
    with pytest.raises(ValueError, match="rotary_dim 24 is no multiple of 16"):
        RopeStyle(rotary_dim=24)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_joins_the_residual_stream_and_the_next_norm_follows(host_library: MakeHostLibrary, name: str) -> None:
    dtype = dtype_of(name)

    check(DenseCases(host_library(dtype)).branch(BRANCHES[name]), dtype)


def test_a_branch_joins_the_residual_stream_where_nothing_follows(host_library: MakeHostLibrary) -> None:
    x, residual, after = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    expected = residual + reference.rms_norm(x, after, EPS)

    BranchNorm(host_library(torch.float32), 64, EPS, has_after=True, has_before=False).launch(
        x, residual, None, after=after
    )

    assert relative_error(residual, expected) < 1e-5


def test_a_norm_without_weight_and_a_weight_without_norm_are_refused(host_library: MakeHostLibrary) -> None:
    x, joins = torch.randn(1, 64), BranchNorm(host_library(torch.float32), 64, EPS, has_after=True, has_before=False)

    for weights in ({}, {"after": torch.ones(64), "before": torch.ones(64)}):
        with pytest.raises(ValueError, match="a norm needs its weight"):
            joins.launch(x, x.clone(), None, **weights)


def test_rms_norm_with_unit_offset_multiplies_by_one_plus_weight(host_library: MakeHostLibrary) -> None:
    x, weight, out = torch.randn(3, 576).bfloat16(), torch.randn(576).bfloat16(), poisoned(3, 576, dtype=torch.bfloat16)

    RmsNorm(host_library(torch.bfloat16), 576, EPS, unit_offset=True).launch(x, weight, out)

    assert torch.equal(out, reference.rms_norm(x, weight, EPS, offset=1.0).bfloat16()), "rounded more than once"


def test_gelu_mul(host_library: MakeHostLibrary) -> None:
    check(DenseCases(host_library(torch.bfloat16)).gelu_mul(), torch.bfloat16)


def test_embedding_multiplies_its_own_rows_and_those_that_were_written_before(host_library: MakeHostLibrary) -> None:
    table, written = torch.randn(10, 64), torch.randn(64)
    out = poisoned(4, 64, dtype=torch.float32)
    out[2] = written
    ids, slots = torch.tensor([3, -1, -5, 10]).int(), torch.tensor([0, 2, 1, 0]).int()

    Embedding(host_library(torch.float32), 64, 2.5).launch(table, ids, slots, torch.tensor([7, 8, 6]).int(), out)

    assert torch.equal(out, 2.5 * torch.stack([table[3], table[6], written, torch.zeros(64)]))


@pytest.mark.parametrize("columns", [640, 393])
def test_a_softcap_keeps_what_is_no_token_and_what_is_beyond_its_columns(
    host_library: MakeHostLibrary, columns: int
) -> None:
    check(DenseCases(host_library(torch.bfloat16)).softcap(columns), torch.bfloat16)
