"""The soft cap of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_kernels.row_params import SoftcapParams

if TYPE_CHECKING:
    import torch

    from loraplex_kernels.module import KernelLibrary

BLOCK = 256


class Softcap:
    """``out = cap * tanh(logits / cap)``."""

    def __init__(self, library: KernelLibrary, cap: float) -> None:
        self._library = library
        self._kernel = library.load("softcap", SoftcapParams(cap=cap), BLOCK)
        self._block_columns = BLOCK * 16 // library.dtype.itemsize

    def launch(self, logits: torch.Tensor, out: torch.Tensor, *, width: int, vocab: int) -> None:
        """Cap the first columns of rows; further columns of ``out`` are left as they are.

        Args:
            logits: ``[rows, columns]``.
            out: ``[rows, columns]``.
            width: Columns that are computed, at most all.
            vocab: Columns from here on are of tokens that a row may lack: -inf stays -inf.

        Raises:
            ValueError: If a shape, dtype or device differs, or there are fewer columns.
        """
        rows, columns = logits.shape
        if width > columns:
            raise ValueError(f"{width} columns are asked for, logits have {columns}")
        params, dtype = self._kernel.params, self._library.dtype
        params.logits = self._library.check("logits", logits, dtype, rows, columns)
        params.out = self._library.check("out", out, dtype, rows, columns)
        params.stride, params.width, params.vocab = columns, width, vocab
        self._kernel.launch(-(-width // self._block_columns), rows)
