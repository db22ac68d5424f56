"""The contract between the scheduler, which decides, and a model runner, which only computes.

A `StepPlan` is self-contained: all that a backend needs to run one step is in it or was handed over earlier by slot. So
it can be executed while the host prepares the next plan, and be broadcast to tensor-parallel ranks. All arrays are host
numpy and are not written any more once the plan is made.

Legend: N = rows (sequences) of the step, T = tokens of the step, S = rows that sample, P = widest block table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from loraplex_common.errors import LoraplexError
from numpy.typing import NDArray

FROM_DEVICE: Final = -1
"""In ``StepPlan.token_ids``: use the token last sampled for this slot, which the host may not know yet."""

NO_ADAPTER: Final = -1
"""In ``StepPlan.adapters``: the row runs on the base model alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingArrays:
    """How the S sampling rows draw, one entry per row of ``StepPlan.sample_rows``.

    Attributes:
        temperature: fp32; 0 is greedy.
        top_k: int32; 0 keeps all.
        top_p: fp32 in (0, 1].
        min_p: fp32 in [0, 1].
        repetition_penalty: fp32; 1 is off. It covers prompt and output.
        presence_penalty: fp32; 0 is off. It covers the output only.
        frequency_penalty: fp32; 0 is off. It covers the output only.
        seed: uint64; with ``position`` the only source of randomness (a Philox counter).
        position: int32; index in the request's output of the token to be drawn, resumed tokens included.
        num_logprobs: int32; -1 none, 0 the drawn token only, k the k likeliest as well.
        ban_stops: bool; end-of-text and stop ids cannot be drawn yet (min_new_tokens).
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    repetition_penalty: NDArray[np.float32]
    presence_penalty: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    seed: NDArray[np.uint64]
    position: NDArray[np.int32]
    num_logprobs: NDArray[np.int32]
    ban_stops: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSetup:
    """Facts of a slot's new occupant that no array carries; sent once, in the occupant's first plan.

    They are sent again after a preemption, with the tokens so far: penalty counts are rebuilt from them.

    Attributes:
        prompt_token_ids: int32; only if the request uses a penalty over them, else empty.
        output_token_ids: int32; tokens drawn before this occupancy, if the request uses a penalty, else empty.
        logit_bias: token id -> value added to its logit.
        allowed_token_ids: If not empty, only these can be drawn.
        stop_token_ids: End-of-text and stop ids, for ``SamplingArrays.ban_stops``; empty if they are never banned.
        prompt_logprobs: How many likeliest tokens to report per prompt position; -1 for no report.
    """

    slot: int
    prompt_token_ids: NDArray[np.int32]
    output_token_ids: NDArray[np.int32]
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int = -1
    uses_penalties: bool = False

    @property
    def is_special(self) -> bool:
        """True if the plan's arrays alone do not say how the occupant draws and what it reports."""
        constrains = bool(self.logit_bias or self.allowed_token_ids or self.stop_token_ids)
        return constrains or self.uses_penalties or self.prompt_logprobs >= 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MoreAdapters:
    """Adapters that are added to the first one of some rows, in the order in which they are added; E entries.

    Attributes:
        rows: int32 ``[E]``, rising; a row comes once for each adapter besides its first.
        adapters: int32 ``[E]``; as ``StepPlan.adapters``, never ``NO_ADAPTER``, and none twice in a row.
        scales: fp32 ``[E]``; as ``StepPlan.adapter_scales``.
    """

    rows: NDArray[np.int32]
    adapters: NDArray[np.int32]
    scales: NDArray[np.float32]


NO_MORE_ADAPTERS: Final = MoreAdapters(
    rows=np.empty(0, dtype=np.int32), adapters=np.empty(0, dtype=np.int32), scales=np.empty(0, dtype=np.float32)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One forward pass over a batch of sequences: decode rows first, then prefill chunks.

    Attributes:
        step_id: Rises by one with each plan.
        slots: int32 ``[N]``; row of the decode state, stable while a request runs.
        num_tokens: int32 ``[N]``; tokens computed per row: 1 for decode, the chunk's length for prefill.
        starts: int32 ``[N]``; tokens of the sequence already in the pool; the row computes positions
            ``[starts, starts + num_tokens)``.
        token_ids: int32 ``[T]``; input tokens row after row; ``FROM_DEVICE`` for a decode row's input.
        block_tables: int32 ``[N, P]``; page id of each block of ``block_tokens`` tokens; unused entries are -1.
        adapters: int32 ``[N]``; index into the runner's adapter table, or ``NO_ADAPTER``.
        adapter_scales: fp32 ``[N]``; the request's own factor on the adapter's scaling.
        num_decode_rows: Rows ``[0, num_decode_rows)`` are decode rows with one token each, the others prefill chunks.
        sample_rows: int32 ``[S]``; rows whose last token's logits are sampled; all but unfinished prefill chunks.
        sampling: How the sampling rows draw.
        masked: int32 ``[M]``, rising; indices into ``sample_rows`` of rows that draw under a mask. A step with such rows draws
            nothing before `StepHandle.draw`.
        more_adapters: Adapters besides the first, of rows that add several up.
        setups: Slots with a new occupant in this step, which begins behind a prefix that others computed, if any.
    """

    step_id: int
    slots: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    starts: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    adapters: NDArray[np.int32]
    adapter_scales: NDArray[np.float32]
    num_decode_rows: int
    sample_rows: NDArray[np.int32]
    sampling: SamplingArrays
    masked: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    more_adapters: MoreAdapters = NO_MORE_ADAPTERS
    setups: tuple[SlotSetup, ...] = ()

    @property
    def begun_slots(self) -> NDArray[np.int32]:
        """Slots whose occupant has its first tokens computed in this step, int32; older state of them is void."""
        begun: NDArray[np.int32] = self.slots[self.starts == 0]
        if self.setups:
            begun = np.union1d(begun, np.array([setup.slot for setup in self.setups], dtype=np.int32))
        return begun


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Probabilities at one position: the drawn token first, then the likeliest, best first.

    Attributes:
        token_ids: int32 ``[1 + k]``.
        logprobs: fp32 ``[1 + k]``, natural logarithms.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step drew.

    Attributes:
        step_id: The plan's number.
        slots: int32 ``[S]``; slots of the plan's sampling rows, in order.
        token_ids: int32 ``[S]``.
        logprobs: index into S -> probabilities, for rows that asked for them.
        prompt_logprobs: slot -> one entry per token this step took as input, except for a sequence's first: an entry is
            the token's probability after the tokens before it, whichever chunk they were in. A prefill that recomputes
            drawn tokens has entries for them too.
        failed_slots: slot -> error that its request ends with (e.g. logits are NaN); only these requests end.
    """

    step_id: int
    slots: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    failed_slots: dict[int, LoraplexError] = field(default_factory=dict)
