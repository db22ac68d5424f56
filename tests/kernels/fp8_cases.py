"""The kernels that quantise to e4m3 on small inputs, and what the plain-torch reference makes of what they computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_engine.model.fp8 import quantise_tokens, widen
from loraplex_kernels.pointwise.fp8 import Fp8Rows, QuantiseFp8, RmsNormFp8, SiluMulFp8

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

ROOM = 8
"""Rows that the e4m3 tensors have room for."""


def new_rows(width: int, device: torch.device, *, has_groups: bool, room: int = ROOM) -> Fp8Rows:
    """Return poisoned rows."""
    groups = -(-width // 128) if has_groups else 1
    codes = torch.full((room, width), 0x7F, dtype=torch.uint8).to(device).view(torch.float8_e4m3fn)
    return Fp8Rows(codes, torch.full((groups, room), float("nan")).to(device))


def wide(rows: Fp8Rows, count: int) -> Tensor:
    """Return what the first rows stand for, fp32, on the host."""
    return widen(rows.codes[:count].cpu(), rows.scales.t()[:count].cpu())


def expected(x: Tensor, *, has_groups: bool) -> Tensor:
    """Return what the reference makes of activations."""
    return widen(*quantise_tokens(x.cpu(), is_blocked=has_groups))


def assert_equal(rows: Fp8Rows, x: Tensor, *, has_groups: bool) -> None:
    """Assert that the first rows are bit by bit what the reference makes of ``x``, and that no other row was touched."""
    codes, scales = quantise_tokens(x.cpu(), is_blocked=has_groups)
    count = len(x)
    assert torch.equal(rows.codes[:count].cpu().view(torch.uint8), codes.contiguous().view(torch.uint8))
    assert torch.equal(rows.scales.t()[:count].cpu(), scales)
    assert (rows.codes[count:].view(torch.uint8) == 0x7F).all()
    assert rows.scales[:, count:].isnan().all()


def quantised(library: KernelLibrary, x: Tensor, *, has_groups: bool) -> Fp8Rows:
    """Quantise activations by the kernel."""
    rows = new_rows(x.shape[1], x.device, has_groups=has_groups)
    QuantiseFp8(library, x.shape[1], has_groups=has_groups).launch(x, rows)
    return rows


def normed(
    library: KernelLibrary,
    x: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    *,
    has_groups: bool,
    has_out: bool = True,
) -> tuple[Fp8Rows, Tensor]:
    """Norm rows by the kernel; return them in e4m3 and in the element type, NaN if the kernel is not to write that."""
    like = x if x is not None else residual
    assert like is not None
    rows = new_rows(like.shape[1], like.device, has_groups=has_groups)
    out = torch.full_like(like, float("nan"))
    kernel = RmsNormFp8(library, like.shape[1], 1e-5, has_groups=has_groups)
    kernel.launch(x, weight, out if has_out else None, rows, residual=residual)
    return rows, out


def activated(
    library: KernelLibrary, gate_up: Tensor, delta: Tensor | None, *, has_groups: bool, has_out: bool = True
) -> tuple[Fp8Rows, Tensor]:
    """Compute SiLU times up by the kernel; return it in e4m3 and in the element type, NaN if the kernel is not to write that."""
    width = gate_up.shape[1] // 2
    rows = new_rows(width, gate_up.device, has_groups=has_groups, room=max(ROOM, len(gate_up) + 1))
    out = torch.full((len(gate_up), width), float("nan"), dtype=gate_up.dtype).to(gate_up.device)
    kernel = SiluMulFp8(library, width, has_groups=has_groups)
    kernel.launch(gate_up, out if has_out else None, rows, delta=delta)
    return rows, out
