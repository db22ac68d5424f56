"""What bounds the scheduler, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What bounds a step and a request.

    Attributes:
        max_model_len: Longest sequence, prompt and output together, in tokens.
        max_num_seqs: Most sequences of one step.
        max_num_batched_tokens: Most tokens of one step.
        max_pass_over_s: How long others may go first while a request waits for pages.
        eos_token_ids: The model's end-of-text ids.
    """

    block_tokens: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_pass_over_s: float
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "each running sequence takes a token of every step"
            )


@dataclass(kw_only=True, slots=True)
class SchedulerCounters:
    """What happened since the start; only ever rises."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
