"""Measures what steps cost on this machine while they run.

A step of n prefill tokens beside decoding rows is modelled as ``decode_step_s + n * prefill_s_per_token``. Steps that
only decode give the first term, steps with prefill the second. The time of a step ends with its result; it starts with
its launch, or with the end of the step before if that was later. So it is the time that the device spent on the step
when steps overlap.
"""

from __future__ import annotations

from typing import Final

WEIGHT: Final = 0.1
"""Weight of the newest measurement in a moving average."""
LONGEST_FADE: Final = 0.999
"""Factor on the longest step time, per step."""
_MIN_PREFILL_TOKENS: Final = 8
"""Least prefill tokens of a step that is measured; with fewer, noise outweighs the prefill."""
_PRIOR_PREFILL_S_PER_TOKEN: Final = 50e-6
_PRIOR_DECODE_STEP_S: Final = 10e-3


class StepCosts:
    """Moving averages of the times of steps.

    Attributes:
        decode_step_s: Time of a step without prefill.
        prefill_s_per_token: Time that each prefill token adds.
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
        """True once prefill was measured; estimates before that are guesses, and no request may end on a guess."""
        return self._has_prefill

    def observe(self, *, launched_s: float, done_s: float, num_prefill_tokens: int) -> None:
        """Add one step's time; steps come in order."""
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
        """Return the time until the first token of a prompt with ``num_tokens`` tokens to compute."""
        return self.decode_step_s + num_tokens * self.prefill_s_per_token
