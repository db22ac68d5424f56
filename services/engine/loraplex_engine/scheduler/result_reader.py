"""Reads a step's result: tokens and probabilities of the requests it was computed for, and which of them have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.messages import FinishReason, PromptLogprobs, TokenWithLogprobs
from loraplex_engine.scheduler.request import RequestState

if TYPE_CHECKING:
    from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
    from loraplex_engine.scheduler.request import Request
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.ruled_rows import RuledRows
    from loraplex_engine.scheduler.running_batch import Chunk, LaunchedStep
    from loraplex_engine.step import StepResult, TokenLogprobs


class ResultReader:
    """Turns results into tokens, probabilities and ends.

    A row whose occupant has changed since the launch holds a speculative token of a request that has ended; it is
    dropped.
    """

    def __init__(
        self, *, book: RequestBook, sharing: PrefixSharing, ruled: RuledRows, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._book = book
        self._ruled = ruled
        self._eos_token_ids = eos_token_ids
        self._batch = book.batch
        self._sharing = sharing
        self._shares = book.queue.shares
        self._outputs = book.outputs
        self._counters = book.counters

    def read(self, step: LaunchedStep, result: StepResult, now_s: float) -> None:
        """Read one result.

        Raises:
            RuntimeError: If it is the result of another plan, or does not fit it.
        """
        if result.step_id != step.step_id or not np.array_equal(result.slots, step.sampled):
            raise RuntimeError(f"result of step {result.step_id} does not fit plan {step.step_id}")
        self._counters.num_steps += 1
        for slot, entries in result.prompt_logprobs.items():
            occupant = self._occupant(step, slot)
            if occupant is not None:
                with self._book.answering_for(occupant, "while its prompt's probabilities were read"):
                    self._send_prompt_logprobs(occupant, entries)
        for slot, error in result.failed_slots.items():
            occupant = self._occupant(step, slot)
            if occupant is not None:
                occupant.is_suspect = True
                self._book.fail(occupant, error)
        for row, chunk in enumerate(step.chunks, step.num_decode_rows):
            if self._batch.state.occupancy[step.rows[row]] == step.occupancy[row]:
                self._confirm(chunk, now_s)
        self._take_tokens(step, result)
        for chunk in step.chunks:
            if chunk.is_last and chunk.request.state is RequestState.RUNNING:
                with self._book.answering_for(chunk.request, "while its blocks were shared"):
                    self._sharing.publish(chunk.request)

    @staticmethod
    def _confirm(chunk: Chunk, now_s: float) -> None:
        request = chunk.request
        request.num_confirmed = chunk.start + chunk.num_tokens
        if chunk.is_last and request.first_token_s is None:
            request.first_token_s = now_s

    def _take_tokens(self, step: LaunchedStep, result: StepResult) -> None:
        state = self._batch.state
        is_complete = self._ruled.follow(step, result) if len(step.masked) else None
        is_live = state.occupancy.take(step.sampled) == step.occupancy.take(step.sample_rows)
        indices = is_live.nonzero()[0]
        if len(indices) == 0:
            return
        rows, positions, token_ids = step.sampled[indices], step.positions[indices], result.token_ids[indices]
        is_stop = state.record(rows, positions, token_ids)
        is_over = is_stop | (positions + 1 >= state.max_outputs.take(rows))
        if is_complete is not None:
            is_over |= is_complete[indices]
        self._counters.num_output_tokens += len(rows)
        self._shares.charge_outputs(state.shares.take(rows))
        is_plain = ~state.wants_logprobs.take(rows)
        plain = rows[is_plain]
        self._outputs.tokens(
            state.sessions.take(plain), state.session_slots.take(plain), positions[is_plain], token_ids[is_plain]
        )
        over = [(index, self._batch.at(int(rows[index]))) for index in is_over.nonzero()[0].tolist()]
        for index in (~is_plain).nonzero()[0].tolist():
            request = self._batch.at(int(rows[index]))
            with self._book.answering_for(request, "while its probabilities were read"):
                event = TokenWithLogprobs(
                    session_slot=request.submission.session_slot,
                    position=int(positions[index]),
                    token_id=int(token_ids[index]),
                    logprobs=result.logprobs[int(indices[index])],
                )
                self._outputs.event(request.submission.session_id, event)
        for index, request in over:
            if request.state is RequestState.ENDED:
                continue  # it failed above: its probabilities could not be read
            if is_stop[index]:
                self._book.finish(request, FinishReason.STOP, int(token_ids[index]))
            elif is_complete is not None and is_complete[indices[index]]:
                self._finish_complete(request, int(token_ids[index]))
            else:
                self._book.finish(request, FinishReason.LENGTH)

    def _finish_complete(self, request: Request, token_id: int) -> None:
        """End a request whose structure is complete, with ignore_eos and before min_new_tokens too: nothing can follow."""
        is_eos = token_id in self._eos_token_ids
        self._book.finish(request, FinishReason.STOP, token_id if is_eos else None)

    def _occupant(self, step: LaunchedStep, slot: int) -> Request | None:
        """Return the request that a step computed in a slot; None if it has left the slot since."""
        row = int(np.flatnonzero(step.rows == slot)[0])
        if self._batch.state.occupancy[slot] != step.occupancy[row]:
            return None
        return self._batch.at(slot)

    def _send_prompt_logprobs(self, request: Request, entries: list[TokenLogprobs]) -> None:
        """Send the probabilities that were not sent before a preemption, and none of recomputed outputs.

        Prompt positions; ``entries[i]`` is the probability of position ``first + i``:

            [1, num_prompt_logprobs + 1)             sent before
            [unsent, num_prompt_tokens)              sent now, as far as ``entries`` reaches
            [num_prompt_tokens, ...)                 outputs that are computed again after a preemption: not sent
        """
        first = request.num_prompt_logprobs_seen + 1  # a prompt's first token has no probability
        request.num_prompt_logprobs_seen += len(entries)
        unsent = max(first, request.num_prompt_logprobs + 1)
        news = entries[unsent - first : max(0, request.num_prompt_tokens - first)]
        if news:
            event = PromptLogprobs(session_slot=request.submission.session_slot, first=unsent, entries=news)
            request.num_prompt_logprobs += len(news)
            self._outputs.event(request.submission.session_id, event)
