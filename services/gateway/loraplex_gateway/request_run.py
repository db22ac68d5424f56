"""What one request has come to: engine news in, events out, times and counts kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_gateway.output import OutputAssembler
from loraplex_gateway.types import Chunk, Finished, FinishReason, Started, Timings, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_gateway.engine_wire import EngineFinish
    from loraplex_gateway.preparation import Prepared
    from loraplex_gateway.ticket import EngineUpdate
    from loraplex_gateway.types import Event


class RequestRun:
    """One request between admission and end: turns engine news into events.

    Args:
        prepared: The request.
        clock: Monotonic seconds.

    Attributes:
        is_finished: True once `Finished` has been made.
    """

    def __init__(self, prepared: Prepared, clock: Callable[[], float]) -> None:
        self.prepared = prepared
        self.arrived_at = clock()
        self.is_finished = False
        self._clock = clock
        self._admitted_at = self.arrived_at
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at = self.arrived_at
        self._cached_tokens = 0
        self._queue_s = self._adapter_load_s = 0.0
        request, job = prepared.request, prepared.job
        self._output = OutputAssembler(
            prepared.model.tokenizer.table,
            options=request.options,
            stopping=request.stopping,
            stop_token_ids=job.stop_token_ids,
            prompt_ids=job.submission.prompt_ids,
        )

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return self._output.num_tokens

    @property
    def used_tokens(self) -> tuple[int, int]:
        """Tokens of prompt and output that an engine has worked on; cached ones are of the prompt."""
        if self._started_at is None:
            return 0, 0
        return len(self.prepared.job.submission.prompt_ids), self.num_tokens

    def admitted(self) -> None:
        """Start the clock of time_limit."""
        self._admitted_at = self._clock()
        limit_s = self.prepared.request.time_limit_s
        if limit_s is not None:
            job = replace(self.prepared.job, time_limit_at=self._admitted_at + limit_s)
            self.prepared = replace(self.prepared, job=job)

    def events(self, engine_id: str, update: EngineUpdate) -> list[Event]:
        """Return what a client is told about an engine's news."""
        events: list[Event] = []
        if update.loading is not None and self.prepared.request.progress_events and self._started_at is None:
            events.append(update.loading)
        if (update.started is not None or update.token_ids) and self._started_at is None:
            events.append(self._start(engine_id, update))
        chunk = self._push(update) if update.token_ids else None
        if self._output.matched_stop is not None:
            return [*events, *_present(chunk), self.finished(FinishReason.STOP)]
        if update.end is None:
            return [*events, *_present(chunk)]
        last = self._output.finish(stop_token_id=update.end.stop_token_id)
        return [*events, *_present(_merged(chunk, last)), self._end(update.end)]

    def cancelled(self) -> list[Event]:
        """Return the last events of a request that its owner ended: text held back so far, then the end."""
        last = self._output.finish(stop_token_id=None)
        is_stopped = self._output.matched_stop is not None
        return [*_present(last), self.finished(FinishReason.STOP if is_stopped else FinishReason.CANCELLED)]

    def finished(
        self, reason: FinishReason, *, stop_token_id: int | None = None, timings: Timings | None = None
    ) -> Finished:
        """Return the last event; timings are measured here unless the engine has sent its own."""
        self.is_finished = True
        submission = self.prepared.job.submission
        return Finished(
            finish_reason=reason,
            stop_string=self._output.matched_stop,
            stop_token_id=stop_token_id,
            usage=Usage(
                prompt_tokens=len(submission.prompt_ids),
                output_tokens=self.num_tokens,
                cached_tokens=self._cached_tokens,
            ),
            timings=timings or self._timings(),
        )

    def _start(self, engine_id: str, update: EngineUpdate) -> Started:
        self._started_at = self._clock()
        self._queue_s = self._admitted_at - self.arrived_at
        started = update.started
        if started is not None:
            self._cached_tokens = started.cached_tokens
            self._queue_s += started.queue_s
            self._adapter_load_s = started.adapter_load_s
        submission = self.prepared.job.submission
        return Started(
            prompt_tokens=len(submission.prompt_ids),
            cached_tokens=self._cached_tokens,
            engine_id=engine_id,
            adapter_revision=submission.adapter_digest,
            seed=submission.sampling.seed or 0,
            prompt_logprobs=started.prompt_logprobs if started is not None else (),
        )

    def _push(self, update: EngineUpdate) -> Chunk | None:
        self._last_token_at = self._clock()
        if self._first_token_at is None:
            self._first_token_at = self._last_token_at
        return self._output.push(update.token_ids, update.logprobs)

    def _end(self, finish: EngineFinish) -> Finished:
        # A stop string completed by the text that was held to the very end.
        if self._output.matched_stop is not None:
            return self.finished(FinishReason.STOP)
        return self.finished(finish.reason, stop_token_id=finish.stop_token_id, timings=self._merged_timings(finish))

    def _merged_timings(self, finish: EngineFinish) -> Timings:
        """Return the engine's timings with our own queue added; ours alone if the stream moved between engines."""
        theirs, ours = finish.timings, self._timings()
        if theirs.prefill_s == 0.0 and theirs.decode_s == 0.0:
            return ours
        return replace(theirs, queue_s=ours.queue_s, adapter_load_s=ours.adapter_load_s)

    def _timings(self) -> Timings:
        started_at = self._started_at if self._started_at is not None else self._clock()
        first_at = self._first_token_at if self._first_token_at is not None else started_at
        return Timings(
            queue_s=self._queue_s if self._started_at is not None else started_at - self.arrived_at,
            adapter_load_s=self._adapter_load_s,
            prefill_s=max(0.0, first_at - started_at),
            decode_s=max(0.0, self._last_token_at - first_at),
        )


def _present(chunk: Chunk | None) -> tuple[Chunk, ...]:
    return () if chunk is None else (chunk,)


def _merged(first: Chunk | None, second: Chunk | None) -> Chunk | None:
    """Return one chunk of two that are sent at once."""
    if first is None or second is None:
        return first or second
    return replace(first, text=first.text + second.text)
