"""The kernels that quantise to e4m3, run on the CPU under sanitizers: codes and scales bit by bit those of the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kernels.fp8_cases import activated, assert_equal, expected, new_rows, normed, quantised, wide
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.pointwise.fp8 import QuantiseFp8
from loraplex_kernels.pointwise.rms_norm import RmsNorm

if TYPE_CHECKING:
    from kernels.conftest import MakeHostLibrary

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
KINDS = pytest.mark.parametrize(
    ("dtype", "has_groups"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)


def every_code() -> torch.Tensor:
    """All numbers of e4m3 in a row, those between two of them, and those next to the middle; 448 is the largest."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([middles * (1 + sign * 2.0**-20) for sign in (-1, 1)])
    row = torch.cat((finite, middles, near, -torch.zeros(1)))
    return torch.cat((row, torch.zeros(-len(row) % 4)))[None]


def test_numbers_are_rounded_as_torch_rounds_them(host_library: MakeHostLibrary) -> None:
    x = every_code()

    assert_equal(quantised(host_library(torch.float32), x, has_groups=False), x, has_groups=False)


@KINDS
def test_rows_of_any_size_become_codes_and_scales(
    host_library: MakeHostLibrary, dtype: torch.dtype, has_groups: bool
) -> None:
    x = (torch.randn(6, 584) * torch.logspace(-20, 20, 6)[:, None]).to(dtype)  # 4.5 groups, of which a warp has two
    x[3], x[4, 0], x[5] = 0, 1e4, 1e-38

    assert_equal(quantised(host_library(dtype), x, has_groups=has_groups), x, has_groups=has_groups)


@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none_in_its_row(
    host_library: MakeHostLibrary, broken: float, has_groups: bool
) -> None:
    x = torch.randn(2, 256).bfloat16()
    x[0, 40] = broken

    found = wide(quantised(host_library(torch.bfloat16), x, has_groups=has_groups), 2)

    assert found[0].isnan().any()
    assert torch.equal(found[1], expected(x[1:], has_groups=has_groups)[0])


@KINDS
def test_a_norm_is_that_of_rms_norm_and_its_codes_are_those_of_what_it_wrote(
    host_library: MakeHostLibrary, dtype: torch.dtype, has_groups: bool
) -> None:
    library = host_library(dtype)
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, 584), (3, 584), (584,)))
    total, plain = residual.clone(), torch.empty_like(x)
    RmsNorm(library, 584, 1e-5).launch(x, weight, plain, residual=total)

    rows, out = normed(library, x, weight, residual, has_groups=has_groups)

    assert torch.equal(out, plain)
    assert torch.equal(residual, total)
    assert_equal(rows, out, has_groups=has_groups)


def test_a_norm_of_the_residual_alone_leaves_it(host_library: MakeHostLibrary) -> None:
    residual, weight = torch.randn(2, 64), torch.randn(64)
    before = residual.clone()

    rows, out = normed(host_library(torch.float32), None, weight, residual, has_groups=False)

    assert relative_error(out, reference.rms_norm(before, weight, 1e-5)) < 1e-5
    assert torch.equal(residual, before)
    assert_equal(rows, out, has_groups=False)


@KINDS
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("num_rows", [2, 4])  # the last is more than multiprocessors are kept busy by: another kernel's
@pytest.mark.parametrize("width", [584, 2184])  # within one turn of a block's threads, and not
def test_silu_times_up_is_quantised_as_it_was_written(
    host_library: MakeHostLibrary, dtype: torch.dtype, has_groups: bool, has_delta: bool, num_rows: int, width: int
) -> None:
    gate_up = (torch.randn(num_rows, 2 * width) * 3).to(dtype)
    delta = torch.randn(num_rows, 2 * width) if has_delta else None

    rows, out = activated(host_library(dtype), gate_up, delta, has_groups=has_groups)

    summed = gate_up if delta is None else (gate_up.float() + delta).to(dtype)
    assert relative_error(out, reference.silu_mul(summed)) < TOLERANCE[dtype]
    assert_equal(rows, out, has_groups=has_groups)


@pytest.mark.parametrize("has_groups", [False, True])
def test_a_row_s_codes_do_not_depend_on_how_many_rows_there_are(
    host_library: MakeHostLibrary, has_groups: bool
) -> None:
    library, gate_up = host_library(torch.bfloat16), (torch.randn(4, 2 * 584) * 3).bfloat16()

    few, _ = activated(library, gate_up[:2].contiguous(), None, has_groups=has_groups)
    many, _ = activated(library, gate_up, None, has_groups=has_groups)

    assert torch.equal(wide(few, 2), wide(many, 2))


@KINDS
def test_codes_and_scales_are_the_same_where_nothing_else_is_written(
    host_library: MakeHostLibrary, dtype: torch.dtype, has_groups: bool
) -> None:
    library = host_library(dtype)
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((4, 584), (4, 584), (584,)))
    gate_up = (torch.randn(4, 2 * 584) * 3).to(dtype)
    sums = [residual.clone() for _ in range(2)]

    for has_out in (True, False):
        rows, out = normed(library, x, weight, sums[has_out], has_groups=has_groups, has_out=has_out)
        pairs = {"norm": (rows, out)}
        for count in (2, 4):  # few rows and many are two kernels'
            pairs[f"gate of {count}"] = activated(
                library, gate_up[:count].contiguous(), None, has_groups=has_groups, has_out=has_out
            )
        if has_out:
            expected_pairs = pairs
    assert torch.equal(sums[0], sums[1])
    for name, (found, out) in pairs.items():
        wanted, plain = expected_pairs[name]
        assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8)), name
        assert torch.equal(found.scales.nan_to_num(), wanted.scales.nan_to_num()), name
        assert plain.isfinite().all()
        assert out.isnan().all()


def test_rows_without_room_are_refused(host_library: MakeHostLibrary) -> None:
    library = host_library(torch.float32)

    with pytest.raises(ValueError, match="3 rows do not fit 2"):
        QuantiseFp8(library, 64, has_groups=False).launch(
            torch.zeros(3, 64), new_rows(64, torch.device("cpu"), has_groups=False, room=2)
        )
