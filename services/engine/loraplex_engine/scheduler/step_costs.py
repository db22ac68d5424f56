"""What steps cost on this machine, measured while they run.

A step of n prefill tokens beside decoding rows is modelled as ``decode_step_s + n * prefill_s_per_token``. Steps that
only decode teach the first, steps with prefill the second. A step's time is from its launch, or from the end of the step
before if that was later, to its result: what the device spent on it when steps overlap.
"""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 0.1
"""Of the newest measurement in a moving average."""
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
    """

    def __init__(self) -> None:
        self.decode_step_s = _PRIOR_DECODE_STEP_S
        self.prefill_s_per_token = _PRIOR_PREFILL_S_PER_TOKEN
        self.longest_step_s = 0.0
        self._has_decode = False
        self._has_prefill = False
        self._last_done_s = 0.0

    @property
    def is_measured(self) -> bool:
        """True once prefill was measured; before that estimates are guesses that no request should die of."""
        return self._has_prefill

    def observe(self, *, launched_s: float, done_s: float, num_prefill_tokens: int) -> None:
        """Take in one step; steps come in order."""
        took_s = done_s - max(launched_s, self._last_done_s)
        self._last_done_s = done_s
        if took_s <= 0:
            return
        self.longest_step_s = max(took_s, 0.999 * self.longest_step_s)
        if num_prefill_tokens == 0:
            weight = _WEIGHT if self._has_decode else 1.0
            self.decode_step_s += weight * (took_s - self.decode_step_s)
            self._has_decode = True
        elif num_prefill_tokens >= _MIN_PREFILL_TOKENS:
            decode_s = min(self.decode_step_s, 0.5 * took_s) if self._has_decode else 0.0
            per_token_s = (took_s - decode_s) / num_prefill_tokens
            weight = _WEIGHT if self._has_prefill else 1.0
            self.prefill_s_per_token += weight * (per_token_s - self.prefill_s_per_token)
            self._has_prefill = True

    def observe_steady(self, *, done_s: float, num_steps: int, growth_s: float = 0.0) -> None:
        """Take in steps without prefill that followed the last observed one, as if one by one.

        Args:
            done_s: When the last of them was done.
            num_steps: How many.
            growth_s: By how much each took longer than the one before it.
        """
        first_s = (done_s - self._last_done_s) / num_steps - growth_s * (num_steps - 1) / 2
        self._last_done_s = done_s
        if first_s <= 0:
            return
        last_s = first_s + growth_s * (num_steps - 1)
        self.longest_step_s = max(last_s, 0.999**num_steps * self.longest_step_s)
        if not self._has_decode:
            self.decode_step_s, self._has_decode = first_s, True
            num_steps, first_s = num_steps - 1, first_s + growth_s
        # x <- x + w (t - x) over t = first + growth i, summed up with q = 1 - w
        fade = (1.0 - _WEIGHT) ** num_steps
        ramp = (num_steps - 1 - num_steps * (1.0 - _WEIGHT) + fade) / _WEIGHT
        self.decode_step_s = fade * self.decode_step_s + (1.0 - fade) * first_s + growth_s * ramp

    def prefill_s(self, num_tokens: int) -> float:
        """Return the time until the first token of a prompt of which ``num_tokens`` are to be computed."""
        return self.decode_step_s + num_tokens * self.prefill_s_per_token
