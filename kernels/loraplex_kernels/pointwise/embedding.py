"""Token embedding, for tokens that the host knows and for tokens just sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_kernels.params import EmbeddingParams

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary


class Embedding:
    """``out[t] = multiplier * table[ids[t]]``; rows that were written before are multiplied too."""

    def __init__(self, library: KernelLibrary, hidden_size: int, multiplier: float = 1.0) -> None:
        self._library, self._hidden = library, hidden_size
        defines = (f"HIDDEN={hidden_size}", *(("SCALED",) if multiplier != 1.0 else ()))
        self._kernel = library.load("embedding", EmbeddingParams(multiplier=multiplier), 128, defines=defines)

    def launch(
        self, table: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, last_sampled: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Gather one row per token.

        Args:
            table: ``[vocab, hidden]``.
            ids: int32 ``[tokens]``; below 0: the token last sampled for the row's slot.
            slots: int32 ``[tokens]``.
            last_sampled: int32 ``[slots]``.
            out: ``[tokens, hidden]``.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, params = self._library.check, self._kernel.params
        params.table = check("table", table, self._library.dtype, -1, self._hidden)
        params.out = check("out", out, self._library.dtype, -1, self._hidden)
        params.ids = check("ids", ids, torch.int32, out.shape[0])
        params.slots = check("slots", slots, torch.int32, out.shape[0])
        params.last_sampled = check("last_sampled", last_sampled, torch.int32, -1)
        params.vocab = table.shape[0]
        self._kernel.launch(out.shape[0])
