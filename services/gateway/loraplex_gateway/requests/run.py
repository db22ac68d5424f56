"""What one request has come to: engine news in, events out, times and counts kept."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import ResumeInvalidError

from loraplex_gateway.engines.ticket import EngineUpdate
from loraplex_gateway.engines.wire import EngineStart, positions
from loraplex_gateway.requests.output import OutputAssembler
from loraplex_gateway.requests.prepared import unsaid_finish
from loraplex_gateway.types import Chunk, Finished, FinishReason, Started, Timings, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loraplex_gateway.engines.wire import EngineFinish, LogprobsMessage
    from loraplex_gateway.requests.prepared import PreparedRequest
    from loraplex_gateway.requests.times import RequestTimes
    from loraplex_gateway.types import Event, PositionLogprobs, Resume
    from loraplex_gateway.usage.account import UsageAccount

# A few milliseconds of the event loop at most.
REPLAY_TOKENS: Final = 128
NEVER_STARTED: Final = EngineStart(cached_tokens=0, queue_s=0.0, adapter_load_s=0.0, prompt_logprobs=())
"""For an output that had ended: no engine hears of it again."""


class RequestRun:
    """One request on its way to its end: turns engine news into events.

    Args:
        prepared: The request.
        times: When it came, and what happened since.
        token: Makes the stream's resume token when it starts.
        account: What it uses; None without a ledger.

    Attributes:
        account: What it uses; None without a ledger.
        prepared: The request.
        times: When what happened to it.
        time_limit_at: When the output is cut (monotonic seconds); None for never. Known once the request is admitted.
        is_finished: True once `Finished` has been made.
        numerics: Numerics of the engine that it was sent to last, or that it began on before it was resumed; None if not known.
        resume_token: Empty until the stream starts, or if it cannot be resumed.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        times: RequestTimes,
        *,
        token: Callable[[RequestRun], str] = lambda _: "",
        account: UsageAccount | None = None,
    ) -> None:
        self.prepared = prepared
        self.times = times
        self.time_limit_at = prepared.continuation.time_limit_at if prepared.continuation is not None else None
        self.numerics = prepared.continuation.numerics if prepared.continuation is not None else None
        self.resume_token = ""
        self.account = account
        self.is_finished = False
        self._token = token
        self._has_engine = False
        self._cached_tokens = 0
        self._queue_s = self._adapter_load_s = 0.0
        self._output = OutputAssembler(
            prepared.model.tokenizer.table,
            options=prepared.request.options,
            stopping=prepared.request.stopping,
            stop_token_ids=prepared.stop_token_ids,
            prompt_ids=prepared.prompt_ids,
            shown_ids=prepared.reading.shown_ids if prepared.reading is not None else frozenset(),
        )

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return self._output.num_tokens

    @property
    def used_tokens(self) -> tuple[int, int]:
        """Tokens that an engine has read, cached ones included, and those that it has made."""
        if not self._has_engine:
            return 0, 0
        return self.prepared.expected_tokens[0], self.num_tokens - len(self.prepared.resumed_ids)

    def admitted(self) -> None:
        """Start the clock of time_limit; that of a resumed stream began with the stream."""
        self.times.admitted()
        limit_s = self.prepared.request.time_limit_s
        if limit_s is not None and self.prepared.continuation is None:
            self.time_limit_at = self.times.admitted_at + limit_s

    def events(self, engine_id: str, update: EngineUpdate) -> list[Event]:
        """Return what a client is told about an engine's news."""
        events: list[Event] = []
        if self.times.started_at is None:
            if update.loading is not None and self.prepared.request.progress_events:
                events.append(update.loading)
            if update.started is not None or update.token_ids:
                events.append(self._start(engine_id, update))
        chunk = self.push(update.token_ids, update.logprobs) if update.token_ids else None
        if self._output.matched_stop is not None:
            return [*events, *_present(chunk), self.finished(FinishReason.STOP)]
        if update.end is None:
            return [*events, *_present(chunk)]
        # A chunk of its own: a client that has these tokens may or may not have what was held back until the end.
        last = self._output.finish(stop_token_id=update.end.stop_token_id)
        return [*events, *_present(chunk), *_present(last), self._end(update.end)]

    def push(self, token_ids: Sequence[int], logprobs: Sequence[LogprobsMessage] = ()) -> Chunk | None:
        """Return what a client is told about tokens that came, `logprobs` parallel to them where asked for."""
        self.times.tokens_came()
        return self._output.push(token_ids, logprobs)

    async def replay(self, resume: Resume) -> list[Event]:
        """Go through what the client has of the output; return its end if there is nothing more to come.

        Raises:
            ResumeInvalidError: If the client's text is not that of its tokens, or goes on behind a stop string.
        """
        ids, output = resume.token_ids, self._output
        for at in range(0, len(ids), REPLAY_TOKENS):
            output.replay(ids[at : at + REPLAY_TOKENS])
            await asyncio.sleep(0)
        if output.num_tokens != len(ids):
            raise _not_its_own("token_ids", f"resume.token_ids goes on behind stop string {output.matched_stop!r}")
        output.go_on(next_sequence=resume.last_sequence + 1 if ids else 0)
        has_last = resume.num_text_bytes not in (None, output.num_text_bytes)
        reached = self.prepared.finish_reached(ids)
        if output.matched_stop is not None and not has_last:
            reached = unsaid_finish(FinishReason.STOP)
        if has_last:
            return self._end_after_last_chunk(resume, reached)
        if reached is None:
            return []
        return self.events("", EngineUpdate(started=NEVER_STARTED, end=reached))

    def _end_after_last_chunk(self, resume: Resume, reached: EngineFinish | None) -> list[Event]:
        """Return the end of an output whose client has all text, also that which was held back to the end.

        If the tokens do not tell why it ended, it was its time, or its owner.
        """
        limit_s = self.prepared.request.time_limit_s
        end = reached or unsaid_finish(FinishReason.TIME_LIMIT if limit_s is not None else FinishReason.CANCELLED)
        shown = self._output.num_text_bytes
        last = None if self._output.matched_stop is not None else self._output.finish(stop_token_id=end.stop_token_id)
        if last is None or shown + len(last.text.encode()) != resume.num_text_bytes:
            raise _not_its_own(
                "text", f"the text of resume.token_ids has {shown} bytes, the client has {resume.num_text_bytes}"
            )
        return [self._start("", EngineUpdate(started=NEVER_STARTED)), self._end(end)]

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
        return Finished(
            finish_reason=reason,
            stop_string=self._output.matched_stop,
            stop_token_id=stop_token_id,
            usage=Usage(
                prompt_tokens=len(self.prepared.prompt_ids),
                output_tokens=self.num_tokens,
                cached_tokens=self._cached_tokens,
            ),
            timings=timings or self._timings(),
        )

    def _start(self, engine_id: str, update: EngineUpdate) -> Started:
        self.times.started()
        self._has_engine = bool(engine_id)  # none where a resumed stream had ended already
        self._queue_s = self.times.admitted_at - self.times.queued_at
        started = update.started
        if started is not None:
            self._cached_tokens = started.cached_tokens
            self._queue_s += started.queue_s
            self._adapter_load_s = started.adapter_load_s
        self.resume_token = self._token(self)
        if self.account is not None:
            self.account.is_resumable = bool(self.resume_token)
        reading, digests = self.prepared.reading, self.prepared.adapter_digests
        return Started(
            prompt_tokens=len(self.prepared.prompt_ids),
            cached_tokens=self._cached_tokens,
            engine_id=engine_id,
            adapter_revision=next(iter(digests), ""),
            adapter_revisions=digests if self.prepared.request.adapters else (),
            adapter_sources=tuple(adapter.source for adapter in self.prepared.adapters if adapter.source),
            numerics=self.numerics or "",
            seed=self.prepared.sampling.seed or 0,
            sampling=self.prepared.sampling,
            resume_token=self.resume_token,
            prompt_logprobs=self._prompt_logprobs(started),
            prompt_token_ids=self.prepared.prompt_ids,
            prompt_text=self.prepared.prompt_text,
            make_parser=reading.parser if reading is not None and reading.rules is not None else None,
            thought_end_id=reading.thought_end_id if reading is not None else None,
        )

    def _prompt_logprobs(self, started: EngineStart | None) -> tuple[PositionLogprobs, ...]:
        if started is None or not started.prompt_logprobs:
            return ()
        return positions(started.prompt_logprobs, self.prepared.model.tokenizer.table.token_bytes)

    def _end(self, finish: EngineFinish) -> Finished:
        # A stop string completed by the text that was held to the very end.
        if self._output.matched_stop is not None:
            return self.finished(FinishReason.STOP)
        if not self.prepared.max_new_tokens and finish.reason is FinishReason.STOP:  # of the token that is dropped
            return self.finished(FinishReason.LENGTH, timings=self._merged_timings(finish))
        return self.finished(finish.reason, stop_token_id=finish.stop_token_id, timings=self._merged_timings(finish))

    def _merged_timings(self, finish: EngineFinish) -> Timings:
        """Return the engine's timings with our own queue added; ours alone if the stream moved between engines."""
        theirs, ours = finish.timings, self._timings()
        if theirs.prefill_s == 0.0 and theirs.decode_s == 0.0:
            return ours
        return replace(theirs, queue_s=ours.queue_s, adapter_load_s=ours.adapter_load_s)

    def _timings(self) -> Timings:
        times = self.times
        started_at = times.started_at if times.started_at is not None else times.clock()
        first_at = times.first_token_at if times.first_token_at is not None else started_at
        return Timings(
            queue_s=self._queue_s if times.started_at is not None else started_at - times.queued_at,
            adapter_load_s=self._adapter_load_s,
            prefill_s=max(0.0, first_at - started_at),
            decode_s=max(0.0, times.last_token_at - first_at),
        )


def _present(chunk: Chunk | None) -> tuple[Chunk, ...]:
    return () if chunk is None else (chunk,)


def _not_its_own(cause: str, message: str) -> ResumeInvalidError:
    return ResumeInvalidError(f"{message}; send the request without resume", metadata={"cause": cause})
