"""What the ranks of a group tell each other in a step besides partial sums.

Rank 0 begins each step with its input, int64 ``[T + 1]``: the token ids in the order of computation, and 1 if it asks for logits
of prompt positions behind the layers. If so, int64 ``[1]`` and the hidden states ``[n, hidden]`` of some positions follow until
that number is 0; all ranks compute lm_head for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.rank_group import RankGroup


def tell_input(group: RankGroup, token_ids: Tensor, *, asks_logits: bool) -> None:
    """Begin a step, on rank 0."""
    group.broadcast(torch.cat((token_ids, token_ids.new_tensor([asks_logits]))))


def hear_input(group: RankGroup, num_tokens: int, device: torch.device) -> tuple[Tensor, bool]:
    """Return the input of a step and whether logits are asked for, on the other ranks."""
    told = torch.empty(num_tokens + 1, dtype=torch.int64, device=device)
    group.broadcast(told)
    return told[:-1], bool(told[-1])


class AskedLogits:
    """Logits that rank 0 asks the other ranks for, behind the layers of one step.

    Args:
        model: This rank's.
        group: The ranks.
    """

    def __init__(self, model: DecoderModel[Any], group: RankGroup) -> None:
        self._model, self._group = model, group

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits ``[n, vocab]`` of hidden states, on rank 0."""
        try:
            self._group.broadcast(torch.tensor([len(states)], device=states.device))
            self._group.broadcast(states.contiguous())
            return self._model.logits(states)
        except Exception:
            self._group.abort()  # the others are in the middle of it, and this exception may be taken for the request's own
            raise

    def end(self) -> None:
        """Ask for no more, on rank 0."""
        self._group.broadcast(torch.tensor([0], device=self._model.embedding.device))

    def follow(self) -> None:
        """Compute what rank 0 asks for until it asks for no more, on the other ranks."""
        embedding = self._model.embedding
        count = torch.empty(1, dtype=torch.int64, device=embedding.device)
        while True:
            self._group.broadcast(count)
            if not int(count):
                return
            states = torch.empty((int(count), embedding.shape[1]), dtype=embedding.dtype, device=embedding.device)
            self._group.broadcast(states)
            self._model.head(states)
