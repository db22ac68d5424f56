"""Draws tokens from logits: masks, constraints, penalties, temperature, truncation, then Gumbel-max with counter-based noise.

The order is vLLM's: mask, allowed ids, logit bias and banned stops; repetition, frequency and presence penalties; (log
probabilities are reported from here); temperature; min_p; top_k and top_p; draw. Steady greedy decoding is one argmax.
Choices do not depend on the backend (csrc/sampling/sample.cu draws the same): ties go to the lower id, masses are integers.

Logits have a column for each token of the base's vocabulary and, in steps with adapters that add tokens, for each token that
an adapter may add: what a row's adapter has not is -inf there. What a row draws does not depend on the width.

Legend: S = sampling rows, V = columns of the logits, W = vocabulary and all tokens that adapters may add, R = rows drawn at
random, C = candidate tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.runners.philox import Noise, gumbel, upload
from loraplex_engine.runners.sampled import LogprobRows, Masks, Sampled, outcomes_of, top_logprobs
from loraplex_engine.runners.slot_faults import blaming, together_or_apart
from loraplex_engine.runners.top_tokens import likeliest, likeliest_tokens
from loraplex_engine.step import SlotSetup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import SamplingArrays

NUCLEUS_CANDIDATES: Final = 1024  # sorted first for top_p; all tokens only if these lack its mass
WEIGHT_ONE: Final = 2.0**40  # fixed point: sums of masses are exact in any order, for 2**20 tokens and more
NEG_INF: Final = float("-inf")
MAX_LOGIT: Final = torch.finfo(torch.float32).max


@dataclass(slots=True)
class SlotState:
    """What a slot's occupant needs besides the plan's arrays.

    Attributes:
        setup: The setup that the scheduler sent.
        seen: Boolean ``[W]``, tokens of prompt and output; ``counts`` int32 ``[W]``, tokens of the output. None without
            penalties.
    """

    setup: SlotSetup
    seen: Tensor | None = None
    counts: Tensor | None = None


class Sampler:
    """Draws tokens; keeps by slot what outlives a step (constraints, penalty counts).

    Args:
        vocab_size: W, most columns of logits.
        device: Where the logits are.
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slots: dict[int, SlotState] = {}

    def occupy(self, setup: SlotSetup) -> None:
        """Take over a slot's new occupant; penalty counts are rebuilt from its tokens.

        No state is kept of an occupant that the plan's arrays describe in full, so batches of such occupants take the
        fast path.
        """
        if not setup.is_special:
            self._slots.pop(setup.slot, None)
            return
        state = SlotState(setup)
        if setup.uses_penalties:
            prompt = upload(setup.prompt_token_ids.astype(np.int64), self._device)
            output = upload(setup.output_token_ids.astype(np.int64), self._device)
            state.counts = torch.bincount(output, minlength=self._vocab_size).to(torch.int32)
            state.seen = state.counts > 0
            state.seen[prompt] = True
        self._slots[setup.slot] = state

    def vacate(self, slots: NDArray[np.int32]) -> None:
        """Forget slots whose new occupant needs no state."""
        if self._slots:
            for slot in slots.tolist():
                self._slots.pop(slot, None)

    def setup(self, slot: int) -> SlotSetup | None:
        """Return the facts of a slot's occupant that the plan's arrays do not carry; None if they carry all."""
        state = self._slots.get(slot)
        return None if state is None else state.setup

    def has_any(self, slots: NDArray[np.int32]) -> bool:
        """Tell whether the sampler keeps state for any of these slots."""
        return bool(self._slots) and any(slot in self._slots for slot in slots.tolist())

    def sample(
        self, logits: Tensor, slots: NDArray[np.int32], arrays: SamplingArrays, masks: Masks | None = None
    ) -> Sampled:
        """Draw one token per row.

        Args:
            logits: ``[S, V]``, any float type and memory order; not changed.
            slots: int32 ``[S]``.
            arrays: How to draw.
            masks: What rows may draw at most; None if all may draw every token.
        """
        special = [(row, self._slots[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._slots]
        random = np.flatnonzero(arrays.temperature > 0)
        asked = np.flatnonzero(arrays.num_logprobs >= 0)
        if not special and not random.size and not asked.size and masks is None:
            best, token_ids = likeliest_tokens(logits)
            return Sampled(token_ids=token_ids, outcomes=outcomes_of(best))
        work = logits.to(torch.float32, memory_format=torch.contiguous_format, copy=True).contiguous()
        if masks is not None:
            masks.apply(work)
        faults: SlotFaults = {}
        for row, state in special:
            with blaming(faults, [int(slots[row])], "while its logits were edited"):
                _constrain(work[row], state, ban_stops=bool(arrays.ban_stops[row]))
                _penalize(work[row], state, arrays, row)
        best, token_ids = work.max(dim=-1)
        if random.size:
            self._draw_rows(work, best, token_ids, random, slots, arrays, faults)
        for row, state in special:
            with blaming(faults, [int(slots[row])], "while its token was counted"):
                _count(state, token_ids[row : row + 1])
        reported: list[LogprobRows] = []
        if asked.size:

            def report(rows: NDArray[np.int64]) -> LogprobRows:
                index = upload(rows, self._device)
                return top_logprobs(work[index].log_softmax(-1), token_ids[index], rows, arrays.num_logprobs[rows])

            reported = together_or_apart(asked, slots, report, faults, "while its probabilities were computed")
        return Sampled(token_ids=token_ids, outcomes=outcomes_of(best), logprobs=tuple(reported), faults=faults)

    def _draw_rows(
        self,
        work: Tensor,
        best: Tensor,
        token_ids: Tensor,
        random: NDArray[np.int64],
        slots: NDArray[np.int32],
        arrays: SamplingArrays,
        faults: SlotFaults,
    ) -> None:
        """Draw the random rows into ``token_ids``; a row that cannot be drawn keeps its likeliest token."""

        def draw(rows: NDArray[np.int64]) -> None:
            index = upload(rows, self._device)
            token_ids[index] = self._draw(work[index] - best[index, None], rows, arrays)

        together_or_apart(random, slots, draw, faults, "while its token was drawn")

    def _draw(self, work: Tensor, rows: NDArray[np.int64], arrays: SamplingArrays) -> Tensor:
        """Draw from logits relative to their maximum, fp32 ``[R, V]``; overwritten."""
        work.div_(self._column(arrays.temperature[rows]))
        min_p = arrays.min_p[rows]
        if (min_p > 0).any():
            work.masked_fill_(work < self._column(min_p).log(), NEG_INF)
        truncated = (arrays.top_k[rows] > 0) | (arrays.top_p[rows] < 1)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for part, draw in (
            (np.flatnonzero(~truncated), self._draw_from_all),
            (np.flatnonzero(truncated), self._draw_truncated),
        ):
            if part.size:
                index = upload(part, self._device)
                noise = Noise(arrays.seed[rows[part]], arrays.position[rows[part]], self._device)
                tokens[index] = draw(work[index], noise, arrays.top_k[rows[part]], arrays.top_p[rows[part]])
        return tokens

    def _draw_from_all(
        self, work: Tensor, noise: Noise, top_k: NDArray[np.int32], top_p: NDArray[np.float32]
    ) -> Tensor:
        """Draw among all tokens; ``top_k`` and ``top_p`` are off."""
        del top_k, top_p
        return (work + gumbel(noise.of_vocabulary(work.shape[1]))).argmax(-1)

    def _draw_truncated(
        self, work: Tensor, noise: Noise, top_k: NDArray[np.int32], top_p: NDArray[np.float32]
    ) -> Tensor:
        """Draw among the top_k likeliest tokens with a mass of top_p together; the likeliest is always among them."""
        columns = work.shape[1]
        limits = np.where(top_k > 0, np.minimum(top_k, columns), columns).astype(np.int64)
        limit, nucleus = self._column(limits), self._column(top_p)
        total = _weights(work).sum(-1, keepdim=True)
        values, tokens = self._likeliest(work, limits, _bound(nucleus, total))
        ranks = torch.arange(values.shape[1], device=self._device)[None]
        values = values.masked_fill(ranks >= limit, NEG_INF)
        weights = _weights(values)
        # After top_k, only the tokens it kept count; without top_k, the mass is that of the whole vocabulary.
        mass = torch.where(limit < columns, weights.sum(-1, keepdim=True), total)
        before = weights.cumsum(-1) - weights
        values.masked_fill_((nucleus < 1) & (before >= _bound(nucleus, mass)), NEG_INF)
        choice = (values + gumbel(noise.of_tokens(tokens))).argmax(-1, keepdim=True)
        return tokens.gather(1, choice)[:, 0]

    def _likeliest(self, work: Tensor, limits: NDArray[np.int64], wanted_mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and ids of enough likeliest tokens for every row's top_k and top_p, best first."""
        count = min(int(limits.max()), NUCLEUS_CANDIDATES)
        values, tokens = likeliest(work, count)
        is_open = limits > count
        holds_mass = (_weights(values).sum(-1, keepdim=True) >= wanted_mass)[:, 0].cpu().numpy()
        if (is_open & ((limits < work.shape[1]) | ~holds_mass)).any():
            values, tokens = work.sort(dim=-1, descending=True, stable=True)
        return values, tokens

    def _column(self, values: NDArray[np.float32] | NDArray[np.int64]) -> Tensor:
        return upload(values[:, None], self._device)


def _weights(values: Tensor) -> Tensor:
    """Return ``exp(values)`` in units of 1 / `WEIGHT_ONE`, int64; values must be at most 0."""
    return (values.exp() * WEIGHT_ONE).to(torch.int64)


def _bound(top_p: Tensor, mass: Tensor) -> Tensor:
    """Return the mass, int64, below which a kept token must begin: ``top_p * mass`` rounded up, 1 at least.

    Tokens in order of falling probability; a token covers the masses ``[begin, begin + weight)``:

        begin in [0, bound)       kept
        begin in [bound, mass)    cut off
    """
    return (top_p.double() * mass.double()).ceil().to(torch.int64)


def _constrain(logits: Tensor, state: SlotState, *, ban_stops: bool) -> None:
    """Apply allowed ids, logit bias and banned stops to one row, in place."""
    setup, device = state.setup, logits.device
    if setup.allowed_token_ids:
        allowed = torch.tensor(setup.allowed_token_ids, device=device)
        kept = logits[allowed]
        logits.fill_(NEG_INF)
        logits[allowed] = kept
    if setup.logit_bias:
        index = torch.tensor(list(setup.logit_bias), device=device)
        logits[index] += torch.tensor(list(setup.logit_bias.values()), dtype=logits.dtype, device=device)
    if ban_stops and setup.stop_token_ids:
        logits[torch.tensor(setup.stop_token_ids, device=device)] = NEG_INF


def _count(state: SlotState, token_id: Tensor) -> None:
    """Count a drawn token, int64 ``[1]``, for the penalties of the next draw."""
    if state.counts is not None and state.seen is not None:
        state.counts.index_add_(0, token_id, state.counts.new_ones(1))
        state.seen.index_fill_(0, token_id, True)


def _penalize(logits: Tensor, state: SlotState, arrays: SamplingArrays, row: int) -> None:
    """Apply repetition, frequency and presence penalties to one row, in place.

    Source: repetition: Keskar et al., "CTRL", arXiv:1909.05858; the other two as in OpenAI's API.
    """
    if state.counts is None or state.seen is None:
        return
    counts, seen = state.counts[: len(logits)], state.seen[: len(logits)]
    repetition = float(arrays.repetition_penalty[row])
    if repetition != 1.0:
        # The factor is a tensor: on a GPU, torch multiplies by the reciprocal of a scalar, which rounds twice.
        divisor = torch.full((), repetition, dtype=logits.dtype, device=logits.device)
        # A tiny penalty makes a likely token certain, never infinite: an infinite logit would leave no valid draw.
        is_raised = (logits > 0) & torch.isfinite(logits)
        penalized = torch.where(is_raised, (logits / divisor).clamp(max=MAX_LOGIT), logits * divisor)
        logits.copy_(torch.where(seen, penalized, logits))
    frequency, presence = float(arrays.frequency_penalty[row]), float(arrays.presence_penalty[row])
    if frequency or presence:
        logits.sub_(counts * frequency).sub_((counts > 0) * presence)
