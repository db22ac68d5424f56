"""Log probabilities of prompt tokens, for requests that ask for them, across the chunks of a prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.runners.sampled import top_logprobs
from loraplex_engine.runners.slot_faults import blaming

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import SlotSetup, StepPlan, TokenLogprobs

CHUNK_POSITIONS: Final = 64  # positions whose logits are held at once: 64 x 128k tokens are 32 MiB in fp32


LogitsOf: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states ``[n, hidden]`` -> logits ``[n, V]``, under some row's adapters."""


class KnowsSetups(Protocol):
    """A sampler, as far as the tracker needs it."""

    def setup(self, slot: int) -> SlotSetup | None:
        """Return the facts of a slot's occupant that the plan's arrays do not carry; None if they carry all."""
        ...


class PromptLogprobTracker:
    """Computes the entry of a prompt token in the step that takes it as input.

    The entry's prediction is the output of the position before, which may have been the last position of an earlier
    chunk: the tracker keeps that hidden state by slot.
    """

    def __init__(self, model: DecoderModel[Any]) -> None:
        self._model = model
        # Slot -> hidden state of the last position computed, [1, hidden], and what computes its logits.
        self._carried: dict[int, tuple[Tensor, LogitsOf]] = {}

    def vacate(self, slots: NDArray[np.int32]) -> None:
        """Forget slots that have a new occupant."""
        if self._carried:
            for slot in slots.tolist():
                self._carried.pop(slot, None)

    @staticmethod
    def is_asked(plan: StepPlan, sampler: KnowsSetups) -> bool:
        """Tell whether `update` will compute logits for some row of a plan."""
        setups = (sampler.setup(slot) for slot in plan.slots[plan.num_decode_rows :].tolist())
        return any(setup is not None and setup.prompt_logprobs >= 0 for setup in setups)

    def update(
        self,
        plan: StepPlan,
        token_ends: NDArray[np.int64],
        token_ids: Tensor,
        hidden: Tensor,
        sampler: KnowsSetups,
        faults: SlotFaults,
        logits_of: Callable[[int], LogitsOf] | None = None,
    ) -> dict[int, list[TokenLogprobs]]:
        """Return slot -> entries of the prompt tokens that this step took as input, except for a prompt's first token.

        Tokens of the step, for a row with tokens ``[first, last)``:

            [first, last - 1)        their hidden states predict ``[first + 1, last)``
            [last - 1, last)         its hidden state is kept; it predicts the first token of the row's next chunk

        Args:
            plan: The step.
            token_ends: int64 ``[N]``; where each row's tokens end in the step.
            token_ids: int64 ``[T]``; the step's input.
            hidden: ``[T, hidden]``; the step's output.
            sampler: Knows which slots asked for entries.
            faults: Gets the slots whose entries cannot be computed.
            logits_of: What computes the logits of a row of the plan; None if the model's own lm_head does for all.
        """
        result: dict[int, list[TokenLogprobs]] = {}
        for row in range(plan.num_decode_rows, len(plan.slots)):
            slot = int(plan.slots[row])
            setup = sampler.setup(slot)
            if setup is None or setup.prompt_logprobs < 0:
                continue
            last = int(token_ends[row])
            first = last - int(plan.num_tokens[row])
            with blaming(faults, [slot], "while its prompt's probabilities were computed"):
                logits = self._model.logits if logits_of is None else logits_of(row)
                result[slot] = self._of_chunk(slot, setup, hidden[first:last], token_ids[first:last], logits)
        return result

    def _of_chunk(
        self, slot: int, setup: SlotSetup, hidden: Tensor, token_ids: Tensor, logits: LogitsOf
    ) -> list[TokenLogprobs]:
        """Return the entries of a chunk's tokens; its last hidden state is kept."""
        states, targets, num_top = hidden[:-1], token_ids[1:], setup.prompt_logprobs
        before = self._carried.get(slot)
        entries: list[TokenLogprobs] = []
        if before is not None and before[1] == logits:
            states, targets = torch.cat((before[0], states)), token_ids
        elif before is not None:
            entries = self._entries(before[0], token_ids[:1], num_top, before[1])
        self._carried[slot] = hidden[-1:].clone(), logits
        return entries + self._entries(states, targets, num_top, logits)

    @staticmethod
    def _entries(states: Tensor, targets: Tensor, num_top: int, logits: LogitsOf) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        for part, wanted in zip(
            torch.split(states, CHUNK_POSITIONS), torch.split(targets, CHUNK_POSITIONS), strict=True
        ):
            count = part.shape[0]
            if count == 0:
                continue
            logprobs = logits(part).float().log_softmax(-1)
            asked = np.full(count, num_top, dtype=np.int32)
            picked = top_logprobs(logprobs, wanted, np.arange(count), asked).to_host()
            entries.extend(picked[position] for position in range(count))
        return entries
