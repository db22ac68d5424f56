"""The likeliest token of each row: what steps draw whose rows are all greedy, inside their graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from loraplex_kernels.module import has_clusters
from loraplex_kernels.row_params import GreedyParams
from loraplex_kernels.sampling.sample import whole_rows

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

BLOCK: Final = 256
SHARES: Final = 8
"""CTAs of a row."""


class Greedy:
    """``token = argmax(logits)`` per row, the lowest id among equals; see csrc/sampling/greedy.cu.

    Args:
        library: Compiles and loads the kernel.
        vocab_size: How far rows of logits lie apart.
        shares: CTAs of a row; 1 where there are no clusters.
    """

    def __init__(self, library: KernelLibrary, vocab_size: int, *, shares: int = SHARES) -> None:
        self._library, self._vocab = library, vocab_size
        self._shares = shares if has_clusters(library.arch) else 1
        defines = (f"THREADS={BLOCK}", f"SHARES={self._shares}", *(f"CLUSTER={self._shares}",) * (self._shares > 1))
        shared_bytes = 8 + 8 * self._shares + 8 * BLOCK // 32
        params = GreedyParams(stride=vocab_size)
        self._kernel = library.load("greedy", params, BLOCK, defines=defines, shared_bytes=shared_bytes)

    def launch(
        self, logits: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor, last_sampled: torch.Tensor
    ) -> None:
        """Draw one token per row.

        Args:
            logits: ``[rows, tokens]``, rows ``vocab_size`` apart; tokens behind the last column are not drawn.
            slots: int32 ``[rows]``.
            drawn: int32 ``[2, rows]``; gets tokens and outcomes, as of `Sample.launch`.
            last_sampled: int32 ``[slots]``; gets each slot's token.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, params, count, vocab = self._library.check, self._kernel.params, drawn.shape[1], self._vocab
        params.logits = check("logits", whole_rows(logits, vocab), self._library.dtype, count, vocab)
        params.slots = check("slots", slots, torch.int32, count)
        params.drawn = check("drawn", drawn, torch.int32, 2, count)
        params.last_sampled = check("last_sampled", last_sampled, torch.int32, -1)
        params.vocab = logits.shape[1]
        self._kernel.launch(count * self._shares)
