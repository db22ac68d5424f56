"""The way of what attention or MLP has computed into the residual stream, and the norm behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_kernels.pointwise.rms_norm import UNIT_OFFSET, rms_norm_build
from loraplex_kernels.row_params import BranchNormParams

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary


class BranchNorm:
    """``residual += multiplier * norm_after(x); out = norm_before(residual)`` over rows of ``hidden_size``.

    Args:
        library: Compiles and loads the kernel.
        hidden_size: Width of the rows.
        eps: Epsilon of the norms.
        has_after: Whether x is normalised before it is added.
        has_before: Whether ``out`` is the residual's norm, not the residual itself.
        unit_offset: Whether norms multiply by 1 + weight.
        multiplier: Factor of what is added.
    """

    def __init__(
        self,
        library: KernelLibrary,
        hidden_size: int,
        eps: float,
        *,
        has_after: bool,
        has_before: bool,
        unit_offset: bool = False,
        multiplier: float = 1.0,
    ) -> None:
        defines, block = rms_norm_build(hidden_size, library.dtype)
        defines = (*defines, *("AFTER",) * has_after, *("BEFORE",) * has_before, *UNIT_OFFSET * unit_offset)
        self._library, self._hidden = library, hidden_size
        self._has_after, self._has_before = has_after, has_before
        params = BranchNormParams(eps=eps, multiplier=multiplier)
        self._kernel = library.load("branch_norm", params, block, defines=defines)

    def launch(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        out: torch.Tensor | None,
        *,
        after: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Add rows to the residual stream and normalise the sums.

        Args:
            x: ``[tokens, hidden]``.
            residual: ``[tokens, hidden]``, updated in place.
            out: ``[num_rows, hidden]``; None if nothing follows the sum.
            after: ``[hidden]``; weight of the norm of x, if there is one.
            before: ``[hidden]``; weight of the norm of the residual, if there is one.
            rows: int32 ``[num_rows]``; rows that are computed, all in order if unset; -1 gives zeros. No row may occur twice.

        Raises:
            ValueError: If a shape, dtype or device differs, or a weight is missing or given for no norm.
        """
        if (after is None) == self._has_after or (before is None) == self._has_before:
            raise ValueError("a norm needs its weight, and a weight its norm")
        check, dtype, hidden, params = self._library.check, self._library.dtype, self._hidden, self._kernel.params
        params.x = check("x", x, dtype, -1, hidden)
        params.residual = check("residual", residual, dtype, -1, hidden)
        params.after = None if after is None else check("after", after, dtype, hidden)
        params.before = None if before is None else check("before", before, dtype, hidden)
        params.out = None if out is None else check("out", out, dtype, -1, hidden)
        num_rows = x.shape[0] if out is None else out.shape[0]
        params.rows = None if rows is None else check("rows", rows, torch.int32, num_rows)
        self._kernel.launch(num_rows)
