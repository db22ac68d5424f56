"""The requests that have a slot, and the plan of their next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loraplex_engine.scheduler.decode_state import Rows
from loraplex_engine.scheduler.request import Request, RequestFaultError
from loraplex_engine.step import FROM_DEVICE, NO_MORE_ADAPTERS, SlotSetup, StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.pages.page_pool import PagePool, Pages
    from loraplex_engine.scheduler.decode_state import DecodeState

_NO_TOKENS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + num_tokens)`` of a request's prefill; the last chunk draws the request's first token."""

    request: Request
    start: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchedStep:
    """What the scheduler remembers of a plan until the plan's result comes.

    Attributes:
        rows: Slots of all rows, ``[N]``.
        occupancy: int64 ``[N]``; each slot's occupancy at the launch.
        sample_rows: int32 ``[S]``; indices into ``rows``.
        sampled: Slots that sample, ``[S]``.
        masked: int32 ``[M]``; indices into ``sampled`` of the rows that draw under a mask.
        positions: int32 ``[S]``; output index that each sampling row draws.
        num_decode_rows: Number of decode rows, which are first; the other rows are chunks.
        chunks: The prefill chunks, in the order of their rows.
    """

    step_id: int
    rows: Rows
    occupancy: NDArray[np.int64]
    sample_rows: NDArray[np.int32]
    sampled: Rows
    masked: NDArray[np.int32]
    positions: NDArray[np.int32]
    num_decode_rows: int
    chunks: tuple[Chunk, ...]
    launched_s: float = 0.0

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)


class RunningBatch:
    """Running requests in the order of their admission.

    Attributes:
        state: The requests' rows.
        rows: Slots by admission; replaced, not changed, when a request comes or goes, as steps in flight keep the old
            array.
        num_prefill_tokens: Tokens of running requests that have yet to be computed before their first draw.
        num_with_rules: Running requests of which the output has rules.
        num_adding_up: Running requests with several adapters.
        version: Rises whenever a request comes or goes.
    """

    def __init__(self, *, state: DecodeState, pool: PagePool) -> None:
        self.state = state
        self.rows: Rows = np.empty(0, dtype=np.intp)
        self._pool = pool
        self._requests: list[Request] = []  # by admission
        self._by_slot: dict[int, Request] = {}
        self._prefilling: list[Request] = []  # by admission
        self._setups: list[SlotSetup] = []
        self.num_prefill_tokens = 0
        self.num_with_rules = 0
        self.num_adding_up = 0
        self.version = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All running requests by admission, as a copy."""
        return list(self._requests)

    def at(self, slot: int) -> Request:
        """Return a slot's occupant."""
        return self._by_slot[slot]

    def seat(
        self,
        request: Request,
        *,
        adapters: Sequence[int],
        found: Pages,
        new: Pages,
        stop_ids: tuple[int, ...],
    ) -> None:
        """Give a request a slot; its prefill starts with the next plan, behind the tokens in the ``found`` pages.

        If it raises, nothing has changed: everything that depends on the request's own settings comes first.
        """
        pages = np.concatenate([found, new]) if len(found) else new
        setup = _setup_of(request, self.state.next_slot, stop_ids)
        request.num_cached = len(found) * self.state.block_tokens
        request.slot = self.state.seat(request, adapters=adapters, pages=pages, stop_ids=stop_ids)
        request.num_prompt_logprobs_seen = 0
        request.num_confirmed = request.num_cached
        self._requests.append(request)
        self._by_slot[request.slot] = request
        self._prefilling.append(request)
        self.num_prefill_tokens += request.num_known_tokens - request.num_cached
        self._setups.append(setup)
        self.num_with_rules += request.submission.rules is not None
        self.num_adding_up += request.adds_up
        self.rows = np.concatenate([self.rows, np.array([request.slot], np.intp)])
        self.version += 1

    def unseat(self, request: Request, last_step: int) -> None:
        """Take a request's slot and pages away; pages without another use are free once ``last_step`` is done."""
        slot = request.slot
        if request in self._prefilling:
            self.num_prefill_tokens -= request.num_known_tokens - int(self.state.num_computed[slot])
            self._prefilling.remove(request)
        self._setups = [setup for setup in self._setups if setup.slot != slot]
        self._requests.remove(request)
        self.num_with_rules -= request.submission.rules is not None
        self.num_adding_up -= request.adds_up
        del self._by_slot[slot]
        request.kv_page_s += self._pool.release(self.state.vacate(slot), last_step)
        request.slot = -1
        self.rows = self.rows[self.rows != slot]
        self.version += 1

    def plan(
        self, step_id: int, decode_rows: Rows, max_tokens: int, now_s: float
    ) -> tuple[StepPlan, LaunchedStep] | None:
        """Build the next step: one token of each decode row, then prefill chunks up to ``max_tokens`` in all.

        Rows of the plan, with D decode rows and C chunks:

            [0, D)        one token each, the one that the device sampled last (`FROM_DEVICE`); all of them sample
            [D, D + C)    ``num_tokens`` prompt tokens each; only rows with a request's last chunk sample

        Raises:
            RequestFaultError: If a chunk cannot be cut; nothing is changed then.
        """
        chunks, inputs = self._cut_chunks(max_tokens - len(decode_rows)) if self._prefilling else ([], [])
        if not chunks and len(decode_rows) == 0:
            return None
        state = self.state
        rows, num_tokens, token_ids, sample_rows = _rows_of(decode_rows, chunks, inputs)
        sampled = rows[sample_rows] if chunks else rows
        plan = StepPlan(
            step_id=step_id,
            slots=rows.astype(np.int32),
            num_tokens=num_tokens,
            starts=state.num_computed.take(rows),
            token_ids=token_ids,
            block_tables=state.block_tables(rows),
            adapters=state.adapters.take(rows),
            adapter_scales=state.adapter_scales.take(rows),
            num_decode_rows=len(decode_rows),
            sample_rows=sample_rows,
            sampling=state.sampling(sampled),
            masked=state.has_rules.take(sampled).nonzero()[0].astype(np.int32) if self.num_with_rules else _NO_TOKENS,
            more_adapters=state.more_adapters_of(rows) if self.num_adding_up else NO_MORE_ADAPTERS,
            setups=tuple(self._take_setups(rows)),
        )
        launched = self._remember(plan, rows, sampled, chunks, now_s)
        state.advance(rows, num_tokens, sampled)
        self._advance(chunks)
        return plan, launched

    def _remember(self, plan: StepPlan, rows: Rows, sampled: Rows, chunks: list[Chunk], now_s: float) -> LaunchedStep:
        return LaunchedStep(
            step_id=plan.step_id,
            rows=rows,
            occupancy=self.state.occupancy.take(rows),
            sample_rows=plan.sample_rows,
            sampled=sampled,
            masked=plan.masked,
            positions=plan.sampling.position,
            num_decode_rows=plan.num_decode_rows,
            chunks=tuple(chunks),
            launched_s=now_s,
        )

    def _cut_chunks(self, budget: int) -> tuple[list[Chunk], list[NDArray[np.int32]]]:
        """Share ``budget`` tokens out to prefills, in the order of admission; returns chunks and their tokens."""
        chunks: list[Chunk] = []
        inputs: list[NDArray[np.int32]] = []
        for request in self._prefilling:
            if budget <= 0:
                break
            try:
                chunks.append(self._cut(request, budget))
                inputs.append(self._tokens_of(chunks[-1]))
            except Exception as error:
                raise RequestFaultError(request) from error
            budget -= chunks[-1].num_tokens
        return chunks, inputs

    def _cut(self, request: Request, budget: int) -> Chunk:
        start = int(self.state.num_computed[request.slot])
        left = request.num_known_tokens - start
        activation = request.submission.adapter_start
        if activation is not None and start < activation:
            budget = min(budget, activation - start)  # a chunk has one adapter or none
        return Chunk(request, start, min(left, budget), left <= budget)

    def _tokens_of(self, chunk: Chunk) -> NDArray[np.int32]:
        tokens: NDArray[np.int32] = self.state.tokens[chunk.request.slot, chunk.start : chunk.start + chunk.num_tokens]
        return tokens

    def _take_setups(self, rows: Rows) -> list[SlotSetup]:
        if not self._setups:
            return []
        planned = set(rows.tolist())
        taken = [setup for setup in self._setups if setup.slot in planned]
        self._setups = [setup for setup in self._setups if setup.slot not in planned]
        return taken

    def _advance(self, chunks: list[Chunk]) -> None:
        """Count chunks as computed; with its last chunk, a request decodes from the next plan on."""
        for chunk in chunks:
            self.num_prefill_tokens -= chunk.num_tokens
            self.state.activate(chunk.request)
            if chunk.is_last:
                self.state.is_decoding[chunk.request.slot] = True
                self._prefilling.remove(chunk.request)


def _rows_of(
    decode_rows: Rows, chunks: list[Chunk], inputs: list[NDArray[np.int32]]
) -> tuple[Rows, NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return ``slots``, ``num_tokens``, ``token_ids`` and ``sample_rows`` of a `StepPlan`: decode rows, then chunks."""
    num_decode = len(decode_rows)
    rows = decode_rows
    num_tokens, token_ids = np.ones(num_decode, np.int32), np.full(num_decode, FROM_DEVICE, np.int32)
    sample_rows = np.arange(num_decode, dtype=np.int32)
    if chunks:
        rows = np.concatenate([rows, np.array([chunk.request.slot for chunk in chunks], np.intp)])
        num_tokens = np.concatenate([num_tokens, np.array([chunk.num_tokens for chunk in chunks], np.int32)])
        token_ids = np.concatenate([token_ids, *inputs])
        last = [num_decode + index for index, chunk in enumerate(chunks) if chunk.is_last]
        sample_rows = np.concatenate([sample_rows, np.array(last, np.int32)])
    return rows, num_tokens, token_ids, sample_rows


def _setup_of(request: Request, slot: int, stop_ids: tuple[int, ...]) -> SlotSetup:
    submission = request.submission
    sampling = submission.sampling
    uses_penalties = sampling.uses_penalties
    ends = submission.rules.end_token_ids if submission.rules is not None else ()
    bans_ends = submission.stopping.min_new_tokens > len(request.output_token_ids)
    return SlotSetup(
        slot=slot,
        prompt_token_ids=submission.prompt_token_ids if uses_penalties else _NO_TOKENS,
        output_token_ids=request.output_token_ids if uses_penalties else _NO_TOKENS,
        logit_bias=sampling.logit_bias,
        allowed_token_ids=sampling.allowed_token_ids,
        stop_token_ids=tuple({*stop_ids, *ends}) if bans_ends else (),
        prompt_logprobs=sampling.prompt_logprobs if request.owes_prompt_logprobs else -1,
        uses_penalties=uses_penalties,
    )
