"""The ranks of a tensor-parallel group but rank 0, which is a `TorchRunner`: they compute the same plans and draw nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_engine.runners.torch.rank_steps import hear_input
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.runners.torch.segments import order_rows, used_adapters

if TYPE_CHECKING:
    from loraplex_engine.step import StepPlan


class TorchFollower(TorchRunner):
    """Computes its part of the steps that rank 0 launches, in the same order, with the same loads in between.

    It needs the rows of a plan, their pages and their adapters. Rank 0 broadcasts the token ids.
    """

    @property
    def collective_s(self) -> float:
        """Seconds that steps have spent in collectives."""
        assert self._group is not None
        return self._group.collective_s

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """Compute a step; returns once rank 0 has its logits."""
        assert self._group is not None
        adapters = {index: self._loads.tables[index] for index in used_adapters(plan)}
        order = order_rows(plan)
        token_ids, asks_logits = hear_input(self._group, int(plan.num_tokens.sum()), self._device)
        hidden = self._hidden_states(plan, order, token_ids, self._lora_step(plan, order, adapters))
        if asks_logits:
            self._asked_logits().follow()
        self._model.head(hidden.index_select(0, self._sampled_tokens(plan, order)))
