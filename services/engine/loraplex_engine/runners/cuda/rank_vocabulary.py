"""Embedding and lm_head of which each rank has the rows of some tokens, as steps compute them (ADR 58).

Neither waits for the host, and shapes depend on a step's sizes alone: graphs hold both.

Legend: T = tokens of the step, S = sampling rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from loraplex_kernels.pointwise.embedding import Embedding
    from torch import Tensor

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.model.vocabulary import Vocabulary

NO_SIGN: Final = 0x7FFFFFFF
"""Bits of an int32 but for its sign: makes of a token before a rank's first one far behind its last."""


class RankEmbedding:
    """`Embedding` of a group: rank 0 tells the step's tokens, each rank looks up its own, and their sum is every token's row.

    Rank 0 alone draws, and knows the tokens last sampled; it tells them on the device.

    Args:
        kernel: Gives rows of zeros to tokens that a rank does not have.
        vocabulary: Which rank has which tokens.
        max_tokens: Tokens of the largest step.
        device: Where steps are computed.
    """

    def __init__(self, kernel: Embedding, vocabulary: Vocabulary, *, max_tokens: int, device: torch.device) -> None:
        self._kernel, self._group = kernel, vocabulary.group
        self._first, _ = vocabulary.bounds[vocabulary.group.rank]
        self._own = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def launch(self, table: Tensor, ids: Tensor, slots: Tensor, last_sampled: Tensor, out: Tensor) -> None:
        """Gather one row per token, on all ranks.

        Args:
            table: ``[tokens of this rank, hidden]``.
            ids: int32 ``[T]``; as of `Embedding.launch` on rank 0, overwritten with the tokens' ids on all ranks.
            slots: As of `Embedding.launch`.
            last_sampled: As of `Embedding.launch`; read on rank 0 alone.
            out: ``[T, hidden]``.
        """
        if self._group.rank == 0:
            torch.where(ids < 0, last_sampled.index_select(0, slots), ids, out=ids)
        self._group.broadcast(ids)
        own = self._own[: len(ids)]
        torch.sub(ids, self._first, out=own).bitwise_and_(NO_SIGN)
        self._kernel.launch(table, own, slots, last_sampled, out)
        self._group.all_reduce(out)


class RankHead:
    """lm_head of a group: each rank computes the logits of its tokens, and rank 0 has them all.

    Args:
        linear: This rank's rows of lm_head.
        vocabulary: Which rank has which tokens.
        max_rows: Most sampling rows.
        like: A tensor of the dtype and on the device of logits.
    """

    def __init__(self, linear: Linear, vocabulary: Vocabulary, *, max_rows: int, like: Tensor) -> None:
        self._linear, self._group, self._bounds = linear, vocabulary.group, vocabulary.bounds
        self._width = max(last - first for first, last in self._bounds)
        num_parts = self._group.degree if self._group.rank == 0 else 0
        self._own = like.new_zeros(max_rows * self._width)
        self._parts = like.new_zeros(num_parts, max_rows * self._width)

    def into(self, x: Tensor, logits: Tensor) -> None:
        """Compute the logits of lm_head's input.

        Args:
            x: ``[S, hidden]``, the same on all ranks.
            logits: ``[S, vocab]``; written on rank 0 alone.
        """
        shape = len(x), self._width
        own, *parts = (each[: len(x) * self._width].view(shape) for each in (self._own, *self._parts))
        self._linear.into(x, own[:, : self._linear.out_features])
        self._group.gather(own, parts)
        for part, (first, last) in zip(parts, self._bounds, strict=False):
            logits[:, first:last].copy_(part[:, : last - first])
