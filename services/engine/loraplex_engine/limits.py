"""What bounds the scheduler, and what it counts."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

DEFAULT_HALF_LIFE_S: Final = 60.0
DEFAULT_PROMOTE_AFTER_S: Final = 30.0
DEFAULT_GROWTH_QUANTILE: Final = 0.9


class QueuePolicy(enum.Enum):
    """Which of a fairness key's requests goes first, and who is ended early.

    Whatever the policy, a request whose deadline cannot be met any more ends early.
    """

    FCFS = "fcfs"  # the oldest; objectives end nobody
    SLO_ABORT = "slo-abort"  # the oldest; who cannot have a first token within the objective ends early
    NEWEST_FIRST = (
        "newest-first"  # as slo-abort, and the newest goes first while older ones wait for half the objective
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingPolicy:
    """How requests and pages are chosen; docs/scheduling.md explains.

    Attributes:
        enable_prefix_cache: Whether requests share blocks.
        enable_warming: Whether likely adapters are loaded before anybody asks, into room that nobody needs.
        half_life_s: After which a use of a prefix or an adapter counts half in its worth.
        growth_quantile: Of recent output lengths: how far running requests are expected to grow when another is admitted;
            0 expects nothing, 1 all they may draw.
        queue_policy: Which request of a fairness key goes first.
        ttft_slo_s: Objective for the time to the first token; what the policies beyond FCFS go by.
        max_running_per_key: Most requests of one fairness key that run at once; None for no limit.
        promote_after_s: Waiting time after which a request rises a class of service.
    """

    enable_prefix_cache: bool = True
    enable_warming: bool = True
    half_life_s: float = DEFAULT_HALF_LIFE_S
    growth_quantile: float = DEFAULT_GROWTH_QUANTILE
    queue_policy: QueuePolicy = QueuePolicy.FCFS
    ttft_slo_s: float | None = None
    max_running_per_key: int | None = None
    promote_after_s: float = DEFAULT_PROMOTE_AFTER_S

    def __post_init__(self) -> None:
        if self.queue_policy is not QueuePolicy.FCFS and self.ttft_slo_s is None:
            raise ValueError(f"policy {self.queue_policy.value} needs ttft_slo_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What bounds a step and a request.

    Attributes:
        max_model_len: Longest sequence, prompt and output together, in tokens.
        max_num_seqs: Most sequences of one step.
        max_num_batched_tokens: Most tokens of one step.
        max_pass_over_s: How long others may go first while a request waits for pages.
        eos_token_ids: The model's end-of-text ids.
        policy: How requests and pages are chosen.
    """

    block_tokens: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_pass_over_s: float
    eos_token_ids: tuple[int, ...]
    policy: SchedulingPolicy = SchedulingPolicy()

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
    num_cached_tokens: int = 0
    num_looked_up_tokens: int = 0
    num_early_aborts: int = 0
