"""What both backends do with a step around its computation: take its slots over, and put its result together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from loraplex_common.errors import InvalidParameterError, LoraplexError

from loraplex_engine.runners.sampled import NOTHING_LEFT, VALID
from loraplex_engine.runners.slot_faults import blaming
from loraplex_engine.step import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from loraplex_engine.runners.prompt_logprobs import PromptLogprobTracker
    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import SlotSetup, StepPlan, TokenLogprobs


class SlotSampler(Protocol):
    """Draws the tokens of slots, as each slot's occupant asks."""

    def vacate(self, slots: NDArray[np.int32]) -> None:
        """Forget the occupants of slots, int32."""
        ...

    def occupy(self, setup: SlotSetup) -> None:
        """Take note of a slot's new occupant."""
        ...


def take_over_slots(plan: StepPlan, sampler: SlotSampler, prompt_logprobs: PromptLogprobTracker) -> SlotFaults:
    """Replace what is kept of slots whose sequence begins in this step; returns the slots that could not be set up."""
    faults: SlotFaults = {}
    begun = plan.begun_slots
    if begun.size:
        sampler.vacate(begun)
        prompt_logprobs.vacate(begun)
    for setup in plan.setups:
        with blaming(faults, [setup.slot], "while its slot was set up"):
            sampler.occupy(setup)
    return faults


def not_finite() -> LoraplexError:
    """Return the error of a request whose logits have no finite maximum."""
    return LoraplexError("the engine cannot go on with this request: the model's logits are not finite")


def nothing_left() -> LoraplexError:
    """Return the error of a request that bans every token that it allows."""
    return InvalidParameterError(
        "no token can be drawn any more: structured output, bad words, allowed token ids and min_new_tokens together rule "
        "out every token"
    )


def make_result(
    plan: StepPlan,
    token_ids: NDArray[np.int32],
    outcomes: NDArray[np.int32],
    faults: SlotFaults,
    *,
    prompt_logprobs: dict[int, list[TokenLogprobs]],
    read_logprobs: Callable[[], dict[int, TokenLogprobs]] | None,
) -> StepResult:
    """Return a step's result, on the host.

    Args:
        plan: The step.
        token_ids: int32 ``[S]``; drawn.
        outcomes: int32 ``[S]``; as in `Sampled`; all but `VALID` end the row's request.
        faults: Slots of which the request alone made something raise.
        prompt_logprobs: See `StepResult`.
        read_logprobs: Returns sampling row -> probabilities; None if no row asked. If it raises, the rows that asked fail.
    """
    slots = plan.slots[plan.sample_rows]
    failed = {
        int(slots[row]): nothing_left() if outcomes[row] == NOTHING_LEFT else not_finite()
        for row in np.flatnonzero(outcomes != VALID)
    } | faults
    logprobs: dict[int, TokenLogprobs] = {}
    if read_logprobs is not None:
        asked = slots[plan.sampling.num_logprobs >= 0].tolist()
        with blaming(failed, asked, "while its probabilities were read"):
            logprobs = read_logprobs()
    return StepResult(
        step_id=plan.step_id,
        slots=slots,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        failed_slots=failed,
    )
