"""RMSNorm, with the residual sum before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from loraplex_kernels.params import RmsNormParams

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

UNIT_OFFSET: Final = ("NORM_OFFSET",)


def rms_norm_build(hidden_size: int, dtype: torch.dtype) -> tuple[tuple[str, ...], int]:
    """Return the macros and block size for a row length."""
    vectors = hidden_size * dtype.itemsize // 16
    block = min(512, -(-vectors // 32) * 32)
    return (f"HIDDEN={hidden_size}", f"THREADS={block}"), block


class RmsNorm:
    """``out = weight * x / sqrt(mean(x^2) + eps)`` over rows of ``hidden_size``; with a unit offset 1 + weight multiplies."""

    def __init__(self, library: KernelLibrary, hidden_size: int, eps: float, *, unit_offset: bool = False) -> None:
        defines, block = rms_norm_build(hidden_size, library.dtype)
        defines = (*defines, *UNIT_OFFSET * unit_offset)
        self._library, self._hidden = library, hidden_size
        self._kernel = library.load("rms_norm", RmsNormParams(eps=eps), block, defines=defines)

    def launch(
        self,
        x: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Normalise rows, after ``residual += x`` if there is a residual.

        Args:
            x: ``[tokens, hidden]``; None to normalise the residual as it is.
            weight: ``[hidden]``.
            out: ``[num_rows, hidden]``; num_rows CTAs are launched.
            residual: ``[tokens, hidden]``, updated in place.
            rows: int32 ``[num_rows]``; rows to normalise, all in order if unset; -1 gives zeros. No row may occur
                twice: the
                sum would be taken twice, or by only one of the two.

        Raises:
            ValueError: If a shape, dtype or device differs, or there is neither x nor residual.
        """
        check, dtype, hidden, params = self._library.check, self._library.dtype, self._hidden, self._kernel.params
        if x is None and residual is None:
            raise ValueError("x or residual is needed")
        params.x = None if x is None else check("x", x, dtype, -1, hidden)
        params.residual = None if residual is None else check("residual", residual, dtype, -1, hidden)
        params.weight = check("weight", weight, dtype, hidden)
        params.out = check("out", out, dtype, -1, hidden)
        params.rows = None if rows is None else check("rows", rows, torch.int32, out.shape[0])
        params.num_rows = out.shape[0]
        self._kernel.launch(out.shape[0])
