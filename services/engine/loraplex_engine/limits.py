"""What bounds an engine and its scheduler, the defaults of all of it, and what is counted."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from loraplex_common.token_rows import DEFAULT_MAX_ADDED_TOKENS

from loraplex_engine.pool_geometry import PoolGeometry

CPU_STEP: Final = (64, 1024)
"""Default sequences and tokens of one step where torch computes on a CPU."""
GPU_STEP: Final = (512, 8192)
"""The same on a GPU; twice 256 sequences are 5 % more tokens/s in bf16 and 8 to 15 % in FP8, see docs/performance.md."""
CPU_POOL_BYTES: Final = 1024 * 1024 * 1024
"""Default page pool on a CPU; on a GPU it is most of what the weights leave."""
ARENA_BYTES: Final = 512 * 1024 * 1024
MAX_PASS_OVER_S: Final = 2.0
MAX_RESIDENT_ADAPTERS: Final = 4096
MAX_ADDED_TOKENS: Final = DEFAULT_MAX_ADDED_TOKENS
MAX_BACKLOG_BYTES: Final = 8 * 1024 * 1024
MAX_BACKLOG_S: Final = 5.0
STEP_PATIENCE_S: Final = 5.0
DEFAULT_HALF_LIFE_S: Final = 60.0
DEFAULT_PROMOTE_AFTER_S: Final = 30.0
DEFAULT_GROWTH_QUANTILE: Final = 0.9


class QueuePolicy(enum.Enum):
    """Which request of a fairness key goes first, and which requests end early.

    Whatever the policy, a request whose deadline cannot be met any more ends early.
    """

    FCFS = "fcfs"  # the oldest; no request ends for its objective
    SLO_ABORT = "slo-abort"  # the oldest; a request whose first token cannot come within the objective ends early
    NEWEST_FIRST = (
        "newest-first"  # as slo-abort, and the newest goes first while older ones wait for half the objective
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingPolicy:
    """How requests and pages are chosen; docs/scheduling.md explains.

    Attributes:
        enable_prefix_cache: Whether requests share blocks.
        enable_warming: Whether likely adapters are loaded before a request asks for them, into idle room.
        half_life_s: Time after which a use of a prefix or an adapter counts half in its worth.
        growth_quantile: Quantile of recent output lengths that running requests are expected to reach when another is
            admitted; 0 expects no growth, 1 all that they may draw.
        queue_policy: Which request of a fairness key goes first.
        ttft_slo_s: Objective for the time to the first token, which every policy but FCFS uses.
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
class EngineLimits:
    """What bounds one engine: its memory, its steps, its requests, and what it waits for.

    Attributes:
        pool: Shape of a page of the pool.
        num_pages: Pages of the pool.
        num_arena_slots: Pages of host memory for adapter images.
        max_resident_adapters: Size of the runner's adapter table; 0 serves the base model alone.
        max_added_tokens: Tokens that an adapter may add behind the base's vocabulary.
        numerics: What loading does to the base's numbers, as `loraplex_common.numerics` writes it.
        max_model_len: Longest sequence, prompt and output together, in tokens.
        max_num_seqs: Most sequences of one step.
        max_num_batched_tokens: Most tokens of one step.
        max_pass_over_s: How long other requests may go first while one waits for pages.
        eos_token_ids: The model's end-of-text ids.
        policy: How requests and pages are chosen.
        max_backlog_bytes: Unread output at which a session is given up.
        max_backlog_s: Age of unread output at which a session is given up.
        step_patience_s: The least time after which a step that does not end hangs; None never takes one for hung.
    """

    pool: PoolGeometry
    num_pages: int
    num_arena_slots: int = 0
    max_resident_adapters: int = MAX_RESIDENT_ADAPTERS
    max_added_tokens: int = MAX_ADDED_TOKENS
    numerics: str = ""
    max_model_len: int
    max_num_seqs: int = CPU_STEP[0]
    max_num_batched_tokens: int = CPU_STEP[1]
    max_pass_over_s: float = MAX_PASS_OVER_S
    eos_token_ids: tuple[int, ...] = ()
    policy: SchedulingPolicy = SchedulingPolicy()
    max_backlog_bytes: int = MAX_BACKLOG_BYTES
    max_backlog_s: float = MAX_BACKLOG_S
    step_patience_s: float | None = STEP_PATIENCE_S

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "each running sequence takes a token of every step"
            )

    @property
    def block_tokens(self) -> int:
        """Tokens of a KV page."""
        return self.pool.block_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, of KV or of an adapter."""
        return self.pool.page_bytes

    @property
    def max_image_pages(self) -> int:
        """Largest adapter image that can ever be used: it needs the arena, and beside it the pool a page for a sequence."""
        return min(self.num_pages - 1, self.num_arena_slots)


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
