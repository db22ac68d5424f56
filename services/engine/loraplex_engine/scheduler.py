"""Decides what the next step computes and what its result means: pure accounting, no clock of its own, no threads.

``schedule`` hands out a plan, ``update`` takes the results in the same order; up to the runner's pipeline depth of
plans may be out in between. Decode inputs are always "the token last sampled", so a plan never waits for the previous
result. A request that turns out to have ended has at most ``depth - 1`` speculative tokens behind it, which are
dropped: its slot's occupancy has changed by then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.errors import (
    AdapterLoadingError,
    DeadlineError,
    DrainingError,
    InvalidParameterError,
    LoraplexError,
    QueueTimeoutError,
)

from loraplex_engine.admission import Admission
from loraplex_engine.deadlines import Deadlines, Limit
from loraplex_engine.decode_state import DecodeState, Rows
from loraplex_engine.messages import (
    Ended,
    FinishReason,
    Loading,
    PromptLogprobs,
    ResidencyState,
    Started,
    StepOutputs,
    Submission,
    TokenWithLogprobs,
)
from loraplex_engine.outputs import OutputCollector
from loraplex_engine.page_pool import PageOwner, PagePool
from loraplex_engine.request import Request, RequestState, make_request
from loraplex_engine.residency import Room
from loraplex_engine.running_batch import LaunchedStep, RunningBatch
from loraplex_engine.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.adapter_cache import AdapterCache
    from loraplex_engine.step import StepPlan, StepResult, TokenLogprobs


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


class Scheduler:
    """Continuous batching with chunked prefill over one pool of KV and adapter pages.

    Args:
        limits: Sizes.
        pool: Pages.
        cache: Adapters, over the same pool.
        page_bytes: Of the pool; for progress in bytes.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        limits: SchedulerLimits,
        pool: PagePool,
        cache: AdapterCache,
        page_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._cache = cache
        self._page_bytes = page_bytes
        self._clock = clock
        self._requests: dict[tuple[int, int], Request] = {}
        self._deadlines = Deadlines()
        self._collector = OutputCollector()
        self._in_flight: deque[LaunchedStep] = deque()
        self._num_submitted = 0
        self._next_step = 0
        self._is_draining = False
        self.queue = WaitingQueue()
        self.counters = SchedulerCounters()
        self.batch = RunningBatch(
            state=DecodeState(
                max_num_seqs=limits.max_num_seqs,
                max_model_len=limits.max_model_len,
                block_tokens=limits.block_tokens,
            ),
            pool=pool,
        )
        self._admission = Admission(
            queue=self.queue,
            batch=self.batch,
            pool=pool,
            cache=cache,
            eos_token_ids=limits.eos_token_ids,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_pass_over_s=limits.max_pass_over_s,
            on_admitted=self._admitted,
            on_refused=self._refused,
        )

    # --- requests ---

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def is_draining(self) -> bool:
        """True once new requests are refused."""
        return self._is_draining

    @property
    def next_deadline_s(self) -> float:
        """When a limit of some request passes next; infinity if none has any."""
        return self._deadlines.next_s

    def submit(self, submission: Submission) -> None:
        """Take a request; it ends in exactly one `Ended`.

        Raises:
            ValueError: If the session has an open request of this number: the gateway breaks the protocol.
        """
        now_s = self._clock()
        request = make_request(
            submission, number=self._num_submitted, now_s=now_s, max_model_len=self._limits.max_model_len
        )
        if request.key in self._requests:
            raise ValueError(f"session {request.key[0]} has an open request {request.key[1]} already")
        self._num_submitted += 1
        self._requests[request.key] = request
        self.queue.add(request)
        if self._is_draining:
            self._fail(request, DrainingError("this engine is shutting down", drop_reason="rejected-shutting-down"))
        elif request.num_prompt_tokens >= self._limits.max_model_len:
            self._fail(request, self._prompt_too_long(request))
        elif len(request.output_token_ids) >= request.max_outputs:
            self._end(request, finish_reason=FinishReason.LENGTH)
        elif not self._admission.refuse_if_too_large(request):
            self._deadlines.add(request)
            self._arrive(request, now_s)

    def _prompt_too_long(self, request: Request) -> LoraplexError:
        return InvalidParameterError(
            f"the prompt has {request.num_prompt_tokens} tokens; with at least one output token that exceeds the "
            f"longest sequence of {self._limits.max_model_len}",
            field="prompt",
        )

    def _arrive(self, request: Request, now_s: float) -> None:
        self._admission.arrive(request, now_s)
        digest = request.adapter_digest
        if digest is None or request.state is RequestState.ENDED or self._is_resident(digest):
            return
        if request.submission.fail_fast:
            error = AdapterLoadingError(
                f"adapter {digest} is being loaded", retry_after_s=max(0.05, self._cache.load_estimate_s)
            )
            self._fail(request, error)
        else:
            self._report_loading(request, digest)

    def _is_resident(self, digest: str) -> bool:
        return self._cache.state_of(digest) is ResidencyState.RESIDENT

    def _report_loading(self, request: Request, digest: str) -> None:
        status = self._cache.status(digest)
        total = status.num_pages * self._page_bytes
        event = Loading(
            session_slot=request.submission.session_slot,
            bytes_done=total if status.is_in_arena else 0,
            bytes_total=total,
        )
        self._collector.event(request.submission.session_id, event)

    def abort(self, session_id: int, session_slot: int) -> None:
        """End a request with CANCELLED; one that has ended already is let be."""
        request = self._requests.get((session_id, session_slot))
        if request is not None:
            self._end(request, finish_reason=FinishReason.CANCELLED)

    def close_session(self, session_id: int) -> None:
        """End all requests of a session; nothing is sent to it any more."""
        for request in [r for key, r in self._requests.items() if key[0] == session_id]:
            self._end(request, finish_reason=FinishReason.CANCELLED)
        self._collector.forget(session_id)

    def end_all(self, error: LoraplexError) -> int:
        """End all open requests with an error; returns how many."""
        requests = list(self._requests.values())
        for request in requests:
            self._fail(request, error)
        return len(requests)

    def open_keys(self) -> list[tuple[int, int]]:
        """Return session and session slot of every request that has not ended."""
        return list(self._requests)

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True

    # --- adapters ---

    def image_arrived(self, spec: AdapterSpec, arena_slots: tuple[int, ...]) -> None:
        """Take over an image in the arena and bring it on for those who wait."""
        was_wanted = self._cache.state_of(spec.digest) is ResidencyState.WANTED
        self._cache.image_arrived(spec, arena_slots)
        waiting = self.queue.of_adapter(spec.digest)
        for request in waiting:
            if not self._admission.refuse_if_too_large(request):
                self._report_loading(request, spec.digest)
        if was_wanted and not waiting and self._cache.state_of(spec.digest) is ResidencyState.IN_ARENA:
            self._admission.load_unattended(spec.digest)

    def image_refused(self, digest: str, error: LoraplexError) -> None:
        """End all requests that wait for an image that the store cannot supply."""
        if self._cache.state_of(digest) is not ResidencyState.WANTED:
            return
        self._cache.image_refused(digest)
        for request in self.queue.of_adapter(digest):
            self._fail(request, error)

    # --- steps ---

    def schedule(self) -> StepPlan | None:
        """Decide the next step; None if there is nothing to compute now. A plan handed out must be launched."""
        now_s = self._clock()
        self._pass_deadlines(now_s)
        for digest in self._cache.take_changed():
            self.queue.unpark(digest, now_s)
        rows = self._grow(self.batch.state.rows_to_decode(self.batch.rows))
        self._admission.admit(now_s)
        planned = self.batch.plan(self._next_step, rows, self._limits.max_num_batched_tokens)
        if planned is None:
            return None
        plan, launched = planned
        self._in_flight.append(launched)
        self._next_step += 1
        return plan

    @property
    def _last_launched(self) -> int:
        return self._next_step - 1

    def _grow(self, rows: Rows) -> Rows:
        """Give rows at the end of their last block another page; returns the rows that can run now.

        Idle adapters give way first, then the requests admitted last are preempted. Where pages come only once steps in
        flight are done, the latest rows sit this step out.
        """
        state = self.batch.state
        while len(rows):
            crossing = state.needs_block(rows)
            needed = int(np.count_nonzero(crossing))
            if needed <= self._pool.num_free:
                break
            room = self._cache.reclaim(needed, lambda digest: digest != self._admission.reserving_digest)
            if room is Room.NO:
                self._preempt(self.batch.latest)
                rows = state.rows_to_decode(self.batch.rows)
            elif room is Room.SOON:
                stalled = np.flatnonzero(crossing)[self._pool.num_free :]
                rows = np.delete(rows, stalled)
        else:
            return rows
        if needed:
            growing = rows[crossing]
            state.append_blocks(growing, self._pool.allocate(needed, PageOwner.KV))
        return rows

    def _preempt(self, request: Request) -> None:
        """Take a running request's place away; it computes its tokens anew when it is admitted again."""
        request.output_token_ids = self.batch.state.outputs(request.slot)
        self._vacate(request)
        request.move_to(RequestState.WAITING)
        self.queue.add(request)
        self.counters.num_preemptions += 1

    def _vacate(self, request: Request) -> None:
        self.batch.unseat(request, self._last_launched)
        if request.adapter_digest is not None:
            self._cache.release(request.adapter_digest, self._last_launched)

    def update(self, result: StepResult) -> None:
        """Take in what the oldest plan in flight drew; news is in `take_outputs`.

        Raises:
            RuntimeError: If it is the result of another plan, or does not fit it.
        """
        step = self._in_flight.popleft()
        if result.step_id != step.step_id or not np.array_equal(result.slots, step.sampled):
            raise RuntimeError(f"result of step {result.step_id} does not fit plan {step.step_id}")
        self._pool.complete(step.step_id)
        self._cache.complete(step.step_id)
        self.counters.num_steps += 1
        now_s = self._clock()
        for slot, entries in result.prompt_logprobs.items():
            self._send_prompt_logprobs(step, slot, entries)
        for slot, reason in result.failed_slots.items():
            self._fail_slot(step, slot, reason)
        for request in step.finished_prefills:
            if request.first_token_s is None:
                request.first_token_s = now_s
        self._take_tokens(step, result)

    def _take_tokens(self, step: LaunchedStep, result: StepResult) -> None:
        state = self.batch.state
        is_live = state.occupancy.take(step.sampled) == step.occupancy.take(step.sample_rows)
        indices = np.flatnonzero(is_live)
        if len(indices) == 0:
            return
        rows, positions, token_ids = step.sampled[indices], step.positions[indices], result.token_ids[indices]
        is_stop = state.record(rows, positions, token_ids)
        is_over = is_stop | (positions + 1 >= state.max_outputs.take(rows))
        self.counters.num_output_tokens += len(rows)
        is_plain = ~state.wants_logprobs.take(rows)
        plain = rows[is_plain]
        self._collector.tokens(
            state.sessions.take(plain), state.session_slots.take(plain), positions[is_plain], token_ids[is_plain]
        )
        for index in np.flatnonzero(~is_plain).tolist():
            submission = self.batch.at(int(rows[index])).submission
            event = TokenWithLogprobs(
                session_slot=submission.session_slot,
                position=int(positions[index]),
                token_id=int(token_ids[index]),
                logprobs=result.logprobs[int(indices[index])],
            )
            self._collector.event(submission.session_id, event)
        for index in np.flatnonzero(is_over).tolist():
            request = self.batch.at(int(rows[index]))
            if is_stop[index]:
                self._end(request, finish_reason=FinishReason.STOP, stop_token_id=int(token_ids[index]))
            else:
                self._end(request, finish_reason=FinishReason.LENGTH)

    def _occupant(self, step: LaunchedStep, slot: int) -> Request | None:
        """Return the request that a step computed in a slot; None if it has left since."""
        row = int(np.flatnonzero(step.rows == slot)[0])
        if self.batch.state.occupancy[slot] != step.occupancy[row]:
            return None
        return self.batch.at(slot)

    def _send_prompt_logprobs(self, step: LaunchedStep, slot: int, entries: list[TokenLogprobs]) -> None:
        occupant = self._occupant(step, slot)
        if occupant is None:
            return
        # A prompt's first token has no probability. Some were sent before a preemption; those of recomputed outputs never.
        first = occupant.num_prompt_logprobs_seen + 1
        occupant.num_prompt_logprobs_seen += len(entries)
        unsent = max(first, occupant.num_prompt_logprobs + 1)
        news = entries[unsent - first : occupant.num_prompt_tokens - first]
        if news:
            event = PromptLogprobs(session_slot=occupant.submission.session_slot, first=unsent, entries=news)
            occupant.num_prompt_logprobs += len(news)
            self._collector.event(occupant.submission.session_id, event)

    def _fail_slot(self, step: LaunchedStep, slot: int, reason: str) -> None:
        occupant = self._occupant(step, slot)
        if occupant is not None:
            self._fail(occupant, LoraplexError(f"the engine cannot go on with this request: {reason}"))

    def take_outputs(self) -> dict[int, StepOutputs]:
        """Return and forget all news: session -> outputs."""
        return self._collector.take(max(0, self._last_launched))

    # --- ends ---

    def _pass_deadlines(self, now_s: float) -> None:
        for limit, request in self._deadlines.pop_passed(now_s):
            if request.state is RequestState.ENDED:
                continue  # an earlier limit of this very turn
            if limit is Limit.DEADLINE:
                self._fail(request, DeadlineError("the client's deadline passed"))
            elif limit is Limit.TIME_LIMIT:
                self._end(request, finish_reason=FinishReason.TIME_LIMIT)
            elif request.admitted_s is None:
                error = QueueTimeoutError(
                    f"no place in a batch within {now_s - request.arrived_s:.3f} s",
                    retry_after_s=1.0,
                    drop_reason="rejected-ttl-expired",
                )
                self._fail(request, error)

    def _admitted(self, request: Request) -> None:
        if request.admitted_s is not None:
            return  # back after a preemption
        request.admitted_s = self._clock()
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        event = Started(
            session_slot=request.submission.session_slot,
            cached_tokens=0,
            queue_s=request.admitted_s - request.arrived_s,
            adapter_load_s=request.adapter_load_s,
        )
        self._collector.event(request.submission.session_id, event)

    def _refused(self, request: Request, error: LoraplexError) -> None:
        self._fail(request, error)

    def _fail(self, request: Request, error: LoraplexError) -> None:
        self._end(request, error=error)

    def _end(
        self,
        request: Request,
        *,
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        error: LoraplexError | None = None,
    ) -> None:
        """End a request, whatever its state: slot, pages, lease and place in the queue go, one `Ended` is sent."""
        if request.state is RequestState.RUNNING:
            self._vacate(request)
        else:
            self.queue.remove(request)
        request.move_to(RequestState.ENDED)
        del self._requests[request.key]
        now_s = self._clock()
        admitted_s = now_s if request.admitted_s is None else request.admitted_s
        first_token_s = now_s if request.first_token_s is None else request.first_token_s
        event = Ended(
            session_slot=request.submission.session_slot,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            error=error,
            queue_s=admitted_s - request.arrived_s,
            adapter_load_s=request.adapter_load_s,
            prefill_s=first_token_s - admitted_s,
            decode_s=now_s - first_token_s,
        )
        self._collector.event(request.submission.session_id, event)

    def check_integrity(self) -> None:
        """Recount pages, leases and requests.

        Raises:
            RuntimeError: If something is lost or counted twice.
        """
        self._pool.check_integrity()
        self._cache.check_integrity()
        state = self.batch.state
        rows = self.batch.rows
        blocks = state.blocks[state.blocks >= 0]
        if len(blocks) != self._pool.num_kv or len(np.unique(blocks)) != len(blocks):
            raise RuntimeError(f"rows have {len(blocks)} pages, the pool accounts {self._pool.num_kv} of KV")
        if int(state.num_blocks[rows].sum()) != len(blocks):
            raise RuntimeError("a slot without an occupant has pages")
        if len(self.batch) + len(self.queue) != len(self._requests):
            raise RuntimeError(f"{len(self.batch)} run, {len(self.queue)} wait, {len(self._requests)} are open")
        leases = sum(request.adapter_digest is not None for request in self.batch.requests)
        if leases != sum(status.num_leases for status in self._cache.statuses()):
            raise RuntimeError(f"{leases} running requests have adapters, the cache counts other leases")
