"""What steps cost on this machine, measured while they run.

A step of n prefill tokens beside decoding rows is modelled as ``decode_step_s + n * prefill_s_per_token``. Steps that
only decode teach the first, steps with prefill the second. A step's time is from its launch, or from the end of the step
before if that was later, to its result: what the device spent on it when steps overlap.
"""

from __future__ import annotations

from typing import Final

WEIGHT: Final = 0.1
"""Of the newest measurement in a moving average."""
LONGEST_FADE: Final = 0.999
"""Of the longest step, per step."""
_MIN_PREFILL_TOKENS: Final = 8
"""Steps with fewer say more about noise than about prefill."""
_PRIOR_PREFILL_S_PER_TOKEN: Final = 50e-6
_PRIOR_DECODE_STEP_S: Final = 10e-3


class StepCosts:
    """Moving averages of what steps took.

    Attributes:
        decode_step_s: Time of a step without prefill.
        prefill_s_per_token: What each prefill token adds.
        longest_step_s: Decaying maximum over all steps.
        has_decode: Whether a step without prefill was measured.
        last_done_s: When the last measured step was done.
    """

    def __init__(self) -> None:
        self.decode_step_s = _PRIOR_DECODE_STEP_S
        self.prefill_s_per_token = _PRIOR_PREFILL_S_PER_TOKEN
        self.longest_step_s = 0.0
        self.has_decode = False
        self._has_prefill = False
        self.last_done_s = 0.0

    @property
    def is_measured(self) -> bool:
        """True once prefill was measured; before that estimates are guesses that no request should die of."""
        return self._has_prefill

    def observe(self, *, launched_s: float, done_s: float, num_prefill_tokens: int) -> None:
        """Take in one step; steps come in order."""
        took_s = done_s - max(launched_s, self.last_done_s)
        self.last_done_s = done_s
        if took_s <= 0:
            return
        self.longest_step_s = max(took_s, LONGEST_FADE * self.longest_step_s)
        if num_prefill_tokens == 0:
            weight = WEIGHT if self.has_decode else 1.0
            self.decode_step_s += weight * (took_s - self.decode_step_s)
            self.has_decode = True
        elif num_prefill_tokens >= _MIN_PREFILL_TOKENS:
            decode_s = min(self.decode_step_s, 0.5 * took_s) if self.has_decode else 0.0
            per_token_s = (took_s - decode_s) / num_prefill_tokens
            weight = WEIGHT if self._has_prefill else 1.0
            self.prefill_s_per_token += weight * (per_token_s - self.prefill_s_per_token)
            self._has_prefill = True

    def prefill_s(self, num_tokens: int) -> float:
        """Return the time until the first token of a prompt of which ``num_tokens`` are to be computed."""
        return self.decode_step_s + num_tokens * self.prefill_s_per_token
