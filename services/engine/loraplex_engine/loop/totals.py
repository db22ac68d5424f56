"""Where the step loop has spent its time, and how large its steps were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

NUM_STEP_SIZES: Final = 18  # up to 65,536 tokens, and one for more


@dataclass(kw_only=True, slots=True)
class LoopTotals:
    """Totals of the step loop since it began; written by its thread alone, read at any time.

    Attributes:
        num_steps: Steps launched.
        num_tokens: Tokens computed, prompts and recomputed ones included.
        num_adapters: Distinct adapters of a step, summed over steps.
        schedule_s: Time spent on making plans.
        launch_s: Time spent on handing plans to the runner, including their computation if the runner computes at once.
        wait_s: Time spent on waiting for results.
        update_s: Time spent on reading results.
        mask_s: Time spent on filling the masks of structured outputs, beside the device.
        step_sizes: Steps by size: entry ``k`` counts those of more than ``2 ** (k - 1)`` and at most ``2 ** k`` tokens.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_adapters: int = 0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    update_s: float = 0.0
    mask_s: float = 0.0
    step_sizes: list[int] = field(default_factory=lambda: [0] * NUM_STEP_SIZES)

    def add_step(self, num_tokens: int) -> None:
        """Count a step of that many tokens."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.step_sizes[min(max(num_tokens - 1, 0).bit_length(), NUM_STEP_SIZES - 1)] += 1
