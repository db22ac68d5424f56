"""Embedding and lm_head of which each tensor-parallel rank holds the rows of some tokens.

Rank r of N holds tokens ``[V r / N, V (r + 1) / N)``, rounded down: any vocabulary is divided, and parts differ by one token.

Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.rank_group import RankGroup


class Vocabulary:
    """Tokens divided over ranks.

    Args:
        vocab_size: All tokens.
        group: The ranks.

    Attributes:
        group: As given.
        bounds: By rank, its first token and the one behind its last.
    """

    def __init__(self, vocab_size: int, group: RankGroup) -> None:
        self.group = group
        ends = [vocab_size * rank // group.degree for rank in range(group.degree + 1)]
        self.bounds = list(itertools.pairwise(ends))
        self._first, self._last = self.bounds[group.rank]

    def embed(self, embedding: Tensor, token_ids: Tensor, out: Tensor) -> None:
        """Write embeddings of tokens into ``out``, ``[T, hidden]``, on all ranks.

        Args:
            embedding: This rank's rows.
            token_ids: int64 ``[T]``, the same on all ranks.
            out: In either memory order.
        """
        is_other = (token_ids < self._first) | (token_ids >= self._last)
        rows = embedding.index_select(0, (token_ids - self._first).masked_fill_(is_other, 0))
        out.copy_(rows.masked_fill_(is_other[:, None], 0))
        self.group.all_reduce(out)

    def gather(self, logits: Tensor) -> Tensor:
        """Return the logits of all tokens, ``[S, vocab]``, on rank 0, and ``logits`` elsewhere.

        Args:
            logits: This rank's, ``[S, tokens]``, in either memory order.
        """
        sizes = [last - first for first, last in self.bounds]
        sent = logits.new_zeros((max(sizes), len(logits)))
        sent[: logits.shape[1]] = logits.t()
        parts = [torch.empty_like(sent) for _ in sizes] if self.group.rank == 0 else []
        self.group.gather(sent, parts)
        if not parts:
            return logits
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).t()
