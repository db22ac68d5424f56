"""The state that changes with every token, as a struct of arrays over slots.

A steady decode step touches these arrays with a few vector operations and no `Request` at all. A slot is one row. The
request in it, its occupant, keeps the row until it ends or is preempted; `occupancy` tells its results from those of
the occupant before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.request_limits import MAX_ADAPTERS
from numpy.typing import NDArray

from loraplex_engine.step import NO_ADAPTER, MoreAdapters, SamplingArrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.pages.page_pool import Pages
    from loraplex_engine.scheduler.request import Request

NO_PAGE: Final = -1
_NO_TOKEN: Final = -1
_MIN_STOP_IDS: Final = 4

Rows = NDArray[np.intp]
"""Slots as numpy indexes with them; int32 costs a conversion each time."""


class DecodeState:
    """Rows of all running requests.

    Legend: S = slots, L = longest sequence, B = blocks of the longest sequence, K = most stop ids of any occupant.

    Attributes:
        occupancy: int64 ``[S]``; rises whenever the occupant changes.
        tokens: int32 ``[S, L]``; prompt and known outputs; untouched rows cost no memory.
        num_prompt_tokens: int32 ``[S]``.
        num_computed: int32 ``[S]``; tokens in the pool once all launched steps are done.
        num_outputs: int32 ``[S]``; output tokens that the host knows.
        next_position: int32 ``[S]``; output index that the next sampling step draws.
        max_outputs: int32 ``[S]``; number of outputs at which the request ends with LENGTH.
        min_outputs: int32 ``[S]``; number of outputs before which stop ids cannot be drawn.
        is_decoding: bool ``[S]``; the row's last prefill chunk was launched.
        blocks: int32 ``[S, B]``; page ids, `NO_PAGE` beyond ``num_blocks``.
        num_blocks: int32 ``[S]``.
        adapters: int32 ``[S]``; index in the runner's table of the adapter that the row's next tokens are computed with.
        leased: int32 ``[S]``; index of the occupant's adapter, also while its tokens are the base model's.
        adapter_scales: fp32 ``[S]``.
        more_adapters: int32 ``[S, M]``, M the most adapters beside the first; in the order in which they are added, then
            `NO_ADAPTER`.
        more_scales: fp32 ``[S, M]``.
        stop_ids: int32 ``[K, S]``; ids that end the output, filled up with -1.
        sessions: int64 ``[S]``.
        session_slots: int32 ``[S]``.
        wants_logprobs: bool ``[S]``; the row's tokens travel as events.
        has_rules: bool ``[S]``; the row draws under a mask.
        shares: int32 ``[S]``; index of the row's fairness key.
        num_shared_blocks: int32 ``[S]``; leading blocks that the row found computed by other requests.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_tokens: int) -> None:
        size = max_num_seqs
        self.block_tokens = block_tokens
        self.occupancy = np.zeros(size, dtype=np.int64)
        self.tokens = np.empty((size, max_model_len), dtype=np.int32)
        self.num_prompt_tokens = np.zeros(size, dtype=np.int32)
        self.num_computed = np.zeros(size, dtype=np.int32)
        self.num_outputs = np.zeros(size, dtype=np.int32)
        self.next_position = np.zeros(size, dtype=np.int32)
        self.max_outputs = np.zeros(size, dtype=np.int32)
        self.min_outputs = np.zeros(size, dtype=np.int32)
        self.is_decoding = np.zeros(size, dtype=np.bool_)
        self.blocks = np.full((size, -(-max_model_len // block_tokens)), NO_PAGE, dtype=np.int32)
        self.num_blocks = np.zeros(size, dtype=np.int32)
        self.adapters = np.full(size, NO_ADAPTER, dtype=np.int32)
        self.leased = np.full(size, NO_ADAPTER, dtype=np.int32)
        self.adapter_scales = np.ones(size, dtype=np.float32)
        self.more_adapters = np.full((size, MAX_ADAPTERS - 1), NO_ADAPTER, dtype=np.int32)
        self.more_scales = np.ones((size, MAX_ADAPTERS - 1), dtype=np.float32)
        self.stop_ids = np.full((_MIN_STOP_IDS, size), _NO_TOKEN, dtype=np.int32)
        self.sessions = np.zeros(size, dtype=np.int64)
        self.session_slots = np.zeros(size, dtype=np.int32)
        self.wants_logprobs = np.zeros(size, dtype=np.bool_)
        self.has_rules = np.zeros(size, dtype=np.bool_)
        self.shares = np.zeros(size, dtype=np.int32)
        self.num_shared_blocks = np.zeros(size, dtype=np.int32)
        self._temperature = np.zeros(size, dtype=np.float32)
        self._top_k = np.zeros(size, dtype=np.int32)
        self._top_p = np.zeros(size, dtype=np.float32)
        self._min_p = np.zeros(size, dtype=np.float32)
        self._repetition_penalty = np.zeros(size, dtype=np.float32)
        self._presence_penalty = np.zeros(size, dtype=np.float32)
        self._frequency_penalty = np.zeros(size, dtype=np.float32)
        self._seed = np.zeros(size, dtype=np.uint64)
        self._num_logprobs = np.zeros(size, dtype=np.int32)
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots without an occupant."""
        return len(self._free)

    @property
    def next_slot(self) -> int:
        """The slot that `seat` takes."""
        return self._free[-1]

    def seat(self, request: Request, *, adapters: Sequence[int], pages: Pages, stop_ids: tuple[int, ...]) -> int:
        """Give a request a slot with its tokens, pages and settings; returns the slot.

        ``adapters`` are the indices of its adapters in the runner's table, in its order. The first pages already hold the request's first ``request.num_cached`` tokens. If it raises, the slot is still
        free.
        """
        slot = self.next_slot
        submission = request.submission
        known = request.num_known_tokens
        self.tokens[slot, : request.num_prompt_tokens] = submission.prompt_token_ids
        self.tokens[slot, request.num_prompt_tokens : known] = request.output_token_ids
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        self.num_computed[slot] = request.num_cached
        self.num_shared_blocks[slot] = request.num_cached // self.block_tokens
        self.shares[slot] = request.share
        self.num_outputs[slot] = self.next_position[slot] = len(request.output_token_ids)
        self.max_outputs[slot] = request.max_outputs
        self.min_outputs[slot] = submission.stopping.min_new_tokens
        self.is_decoding[slot] = False
        self._set_adapters(slot, request, adapters)
        self._set_stop_ids(slot, stop_ids)
        self.has_rules[slot] = submission.rules is not None
        self.sessions[slot] = submission.session_id
        self.session_slots[slot] = submission.session_slot
        self._set_sampling(slot, request)
        self.blocks[slot, : len(pages)] = pages
        self.num_blocks[slot] = len(pages)
        self._free.pop()
        return slot

    def _set_adapters(self, slot: int, request: Request, adapters: Sequence[int]) -> None:
        first = adapters[0] if adapters else NO_ADAPTER
        self.leased[slot] = first
        self.adapters[slot] = first if request.applies_adapter_at(request.num_cached) else NO_ADAPTER
        self.adapter_scales[slot] = request.submission.adapter_scale
        self.more_adapters[slot] = NO_ADAPTER
        if len(adapters) > 1:
            num_more = len(adapters) - 1
            self.more_adapters[slot, :num_more] = adapters[1:]
            self.more_scales[slot, :num_more] = [term.scale for term in request.submission.more_adapters]

    def more_adapters_of(self, rows: Rows) -> MoreAdapters:
        """Return the adapters beside the first of ``rows``, by their place in ``rows``."""
        indices = self.more_adapters.take(rows, axis=0)
        places = indices != NO_ADAPTER
        return MoreAdapters(
            rows=places.nonzero()[0].astype(np.int32),
            adapters=indices[places],
            scales=self.more_scales.take(rows, axis=0)[places],
        )

    def activate(self, request: Request) -> None:
        """Let a row's tokens be computed with its adapter from where the adapter applies on."""
        slot = request.slot
        if request.applies_adapter_at(int(self.num_computed[slot])):
            self.adapters[slot] = self.leased[slot]

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        most, num_slots = self.stop_ids.shape
        if len(stop_ids) > most:
            wider = np.full((max(len(stop_ids), 2 * most), num_slots), _NO_TOKEN, dtype=np.int32)
            wider[:most] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[:, slot] = _NO_TOKEN
        self.stop_ids[: len(stop_ids), slot] = stop_ids

    def _set_sampling(self, slot: int, request: Request) -> None:
        sampling = request.submission.sampling
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._repetition_penalty[slot] = sampling.repetition_penalty
        self._presence_penalty[slot] = sampling.presence_penalty
        self._frequency_penalty[slot] = sampling.frequency_penalty
        self._seed[slot] = sampling.seed
        self._num_logprobs[slot] = sampling.num_logprobs
        self.wants_logprobs[slot] = sampling.num_logprobs >= 0

    def vacate(self, slot: int) -> Pages:
        """Free a slot and return its pages; results of steps in flight no longer match its occupancy."""
        pages = self.blocks[slot, : self.num_blocks[slot]].astype(np.intp)
        self.blocks[slot, : len(pages)] = NO_PAGE
        self.num_blocks[slot] = 0
        self.is_decoding[slot] = False
        self.occupancy[slot] += 1
        self._free.append(slot)
        return pages

    def outputs(self, slot: int) -> NDArray[np.int32]:
        """Return a copy of a slot's output tokens that the host knows, int32."""
        first = self.num_prompt_tokens[slot]
        return self.tokens[slot, first : first + self.num_outputs[slot]].copy()

    def rows_to_decode(self, rows: Rows) -> Rows:
        """Return the ``rows`` that have another token to draw, in the same order."""
        return rows[self.is_decoding.take(rows) & (self.next_position.take(rows) < self.max_outputs.take(rows))]

    def needs_block(self, rows: Rows) -> NDArray[np.bool_]:
        """Tell per row whether its next token lies beyond its blocks."""
        crosses: NDArray[np.bool_] = self.num_computed.take(rows) == self.num_blocks.take(rows) * self.block_tokens
        return crosses

    def append_blocks(self, rows: Rows, pages: Pages) -> None:
        """Give each row one more page."""
        self.blocks[rows, self.num_blocks[rows]] = pages
        self.num_blocks[rows] += 1

    def block_tables(self, rows: Rows) -> NDArray[np.int32]:
        """Return a copy of the rows' blocks, ``[N, P]`` with P the widest of them."""
        return self.blocks[rows, : self.num_blocks.take(rows).max(initial=0)]

    def sampling(self, rows: Rows) -> SamplingArrays:
        """Return how the rows draw next, copied."""
        position = self.next_position.take(rows)
        return SamplingArrays(
            temperature=self._temperature.take(rows),
            top_k=self._top_k.take(rows),
            top_p=self._top_p.take(rows),
            min_p=self._min_p.take(rows),
            repetition_penalty=self._repetition_penalty.take(rows),
            presence_penalty=self._presence_penalty.take(rows),
            frequency_penalty=self._frequency_penalty.take(rows),
            seed=self._seed.take(rows),
            position=position,
            num_logprobs=self._num_logprobs.take(rows),
            ban_stops=position < self.min_outputs.take(rows),
        )

    def advance(self, rows: Rows, num_tokens: NDArray[np.int32], sampled: Rows) -> None:
        """Count a launched step over ``rows``, which draws one token for each row of ``sampled``."""
        self.num_computed[rows] += num_tokens
        self.next_position[sampled] += 1

    def record(self, rows: Rows, positions: NDArray[np.int32], token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Write down drawn tokens and tell per row whether it drew one of its stop ids."""
        self.tokens[rows, self.num_prompt_tokens.take(rows) + positions] = token_ids
        self.num_outputs[rows] = positions + 1
        is_stop: NDArray[np.bool_] = np.logical_or.reduce(self.stop_ids.take(rows, axis=1) == token_ids, axis=0)
        is_stop &= positions >= self.min_outputs.take(rows)
        return is_stop
