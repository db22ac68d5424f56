"""What became of each request: one log line and its share of the metrics."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.tracing import ids_of
from loraplex_common.usage_records import UsageRecord
from loraplex_common.vllm_metrics import FinishedRequest

from loraplex_gateway.requests.request_span import end_span
from loraplex_gateway.types import Chunk, Finished, FinishReason, Started
from loraplex_gateway.weighted import with_weights

if TYPE_CHECKING:
    from typing import Self

    from loraplex_common.tracing import Span

    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.metrics.vllm import ModelMeter
    from loraplex_gateway.requests.prepared import PreparedRequest
    from loraplex_gateway.requests.times import RequestTimes
    from loraplex_gateway.types import Event, GenerationRequest
    from loraplex_gateway.usage.ledger import UsageLedger

# A client hangs up at its deadline, which by our clock may still be to come.
DEADLINE_MARGIN_S: Final = 0.05
SEVERAL: Final = "(several)"
"""Stands in a metric's label for a request of several adapters; no adapter has such a name."""

_log = get_logger()


class RequestRecord:
    """Watches one request's events go by; a block around them ends with its line in the log.

    Args:
        request: The request, its id filled in.
        tenant: The tenant that asks.
        metrics: Where it is counted.
        times: When it came, and what happened since.
        time_left_s: From its arrival until the caller's deadline; None for no deadline.
        ledger: Where what it uses is written; None for nowhere.

    Attributes:
        request: The request.
        times: When what happened to it.
        time_left_s: From its arrival until the caller's deadline; None for no deadline.
        account: What it uses; None without a ledger.
        span: Its span in a trace; None while tracing is off.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tenant: str,
        *,
        metrics: GatewayMetrics,
        times: RequestTimes,
        time_left_s: float | None,
        ledger: UsageLedger | None = None,
    ) -> None:
        self._prepared: PreparedRequest | None = None
        self._model = ""
        self._meter: ModelMeter | None = None
        self.request = request
        self._tenant = tenant
        self._metrics = metrics
        self.times = times
        self.time_left_s = time_left_s
        self._seen_at: float | None = None  # when the newest tokens came of which a chunk has gone by
        self._started: Started | None = None
        self._finished: Finished | None = None
        self._num_tokens = 0
        self._num_resumed: int | None = None
        self._ledger = ledger
        self.span: Span | None = None
        self.account = ledger.open() if ledger is not None else None

    def resumes(self, request_id: str, *, num_tokens: int, usage_id: str = "") -> None:
        """Note that this goes on with a stream that gave so many tokens: they and the prompt were counted there."""
        self.request = replace(self.request, request_id=request_id)
        self._num_tokens = self._num_resumed = num_tokens
        if self.account is not None:
            self.account.is_continuing = True
            self.account.usage_id = usage_id or self.account.usage_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, LoraplexError):
            error = LoraplexError("unexpected error")  # logged, with its traceback, where it becomes a status
        self._end(error if isinstance(error, LoraplexError) else None)

    def prepared(self, prepared: PreparedRequest) -> None:
        """Count the request for its model and adapter from here on: what a client calls them is no label before."""
        self._prepared = prepared
        self._model = prepared.model.name
        self._meter = self._metrics.vllm.of(self._model)

    def see(self, event: Event, *, num_tokens: int) -> None:
        """Take note of an event; `num_tokens` is the output's length after it, whatever the chunk carries."""
        if isinstance(event, Chunk):
            self._see_tokens(num_tokens)
        elif isinstance(event, Started):
            self._started = event
            if self._num_resumed is None:
                assert self._meter is not None  # nothing starts before it is prepared
                self._meter.started(event.prompt_tokens, event.cached_tokens)
        elif isinstance(event, Finished):
            self._finished = event
            self._num_tokens = event.usage.output_tokens

    def _end(self, error: LoraplexError | None) -> None:
        """Log and count the request. Without `Finished` and without error the client went away, maybe at its deadline."""
        times = self.times
        duration_s = times.clock() - times.arrived_at
        if error is not None:
            code, reason = error.code.name, error.reason
        elif self._finished is not None:
            code, reason = "OK", self._finished.finish_reason.name
        elif self.time_left_s is not None and duration_s >= self.time_left_s - DEADLINE_MARGIN_S:
            code, reason = "DEADLINE_EXCEEDED", "DEADLINE"
        else:
            code, reason = "CANCELLED", "CLIENT_GONE"
        self._count(code, reason)
        record = self._usage(code, reason, duration_s)
        self._log(record, error)
        account = self.account
        if self._ledger is not None and account is not None and (account.num_attempts or self._started is not None):
            self._ledger.finish(account, record)  # else no engine has heard of it
        if self.span is not None:
            end_span(self.span, self.request, record, times, self._finished)

    def _log(self, record: UsageRecord, error: LoraplexError | None) -> None:
        """Write the request's line."""
        started, first_token_at = self._started, self.times.first_token_at
        page_seconds = self.account.page_seconds if self.account is not None else None
        _log.info(
            "request",
            request_id=record.request_id,
            trace_id=record.trace_id,
            otel_trace_id=ids_of(self.request.traceparent)[0] or None,
            tenant=record.tenant,
            model=record.model,
            adapter=record.adapter,
            adapter_revision=_revisions(started),
            adapter_source=", ".join(started.adapter_sources) if started else "",
            engine_id=started.engine_id if started else "",
            code=record.code,
            reason=record.reason,
            error=error.message if error is not None else None,
            prompt_tokens=record.input_tokens,
            cached_tokens=record.cached_tokens,
            output_tokens=record.output_tokens,
            resumed_tokens=self._num_resumed,
            queue_s=record.queue_s if self._finished else None,
            ttft_s=round(first_token_at - self.times.arrived_at, 4) if first_token_at is not None else None,
            duration_s=record.duration_s,
            usage_id=record.usage_id or None,
            kv_page_s=page_seconds[0] if page_seconds is not None else None,
            adapter_page_s=page_seconds[1] if page_seconds is not None else None,
        )

    def _usage(self, code: str, reason: str, duration_s: float) -> UsageRecord:
        """Return the request's record, with what its engines have reported so far."""
        account, started, prepared, finished = self.account, self._started, self._prepared, self._finished
        kv_page_s, adapter_page_s = (account.page_seconds if account is not None else None) or (0.0, 0.0)
        return UsageRecord(
            usage_id=account.usage_id if account is not None else "",
            request_id=self.request.request_id,
            trace_id=self.request.trace_id or self.request.request_id,
            tenant=self._tenant,
            model=self._model,
            adapter=self.request.adapter or with_weights(self.request.adapters),
            revision=", ".join(prepared.adapter_digests) if prepared is not None else "",
            input_tokens=started.prompt_tokens if started is not None else 0,
            cached_tokens=started.cached_tokens if started is not None else 0,
            output_tokens=self._num_tokens,
            generated_tokens=self._num_tokens - (self._num_resumed or 0),
            queue_s=round(finished.timings.queue_s, 4) if finished is not None else 0.0,
            duration_s=round(duration_s, 4),
            kv_page_s=kv_page_s,
            adapter_page_s=adapter_page_s,
            attempts=account.num_attempts if account is not None else 0,
            unmetered_attempts=account.num_unmetered if account is not None else 0,
            code=code,
            reason=reason,
            ended_at=round(time.time(), 3),
        )

    def _see_tokens(self, num_tokens: int) -> None:
        times, seen_at = self.times, self._seen_at
        num_new = num_tokens - self._num_tokens
        meter = self._meter
        assert meter is not None  # nothing gives tokens before it is prepared
        if seen_at is None:
            wait_s = (times.first_token_at or times.last_token_at) - times.arrived_at
            if self._num_resumed:  # the first token was another stream's
                meter.gaps.resumed(num_new, wait_s / max(num_new, 1))
            else:
                self._metrics.ttft.observe(wait_s)
                meter.first_tokens(num_new, wait_s)
        elif num_new > 0:
            meter.gaps.further(num_new, (times.last_token_at - seen_at) / num_new)
        self._seen_at = times.last_token_at
        self._num_tokens = num_tokens

    def _count(self, code: str, reason: str) -> None:
        metrics, started, prepared = self._metrics, self._started, self._prepared
        adapters = prepared.adapters if prepared is not None else ()
        name = SEVERAL if len(adapters) > 1 else "".join(adapter.name for adapter in adapters)
        restricted = len(adapters) == 1 and adapters[0].is_restricted
        label = metrics.adapter_label(name, is_restricted=restricted)
        metrics.requests.labels(self._model, label, code).inc()
        if self._meter is not None:
            self._count_for_vllm(self._meter, code)
        if code != "OK" or reason == FinishReason.CANCELLED.name:
            metrics.aborts.labels(reason).inc()
        is_first = started is not None and self._num_resumed is None
        metrics.count_tokens(
            self._tenant,
            num_input=started.prompt_tokens if started is not None and is_first else 0,
            num_output=self._num_tokens - (self._num_resumed or 0),
            num_cached=started.cached_tokens if started is not None and is_first else 0,
        )

    def _count_for_vllm(self, meter: ModelMeter, code: str) -> None:
        """Count the end of a request that was not refused, and what it was like if it ended well."""
        finished = self._finished
        if code != "OK" or finished is None:
            meter.ended("abort" if code in ("CANCELLED", "DEADLINE_EXCEEDED") else "error")
            return
        meter.finished(
            finished.finish_reason.name.lower(),
            FinishedRequest(
                num_prompt_tokens=finished.usage.prompt_tokens,
                num_cached_tokens=finished.usage.cached_tokens,
                num_output_tokens=finished.usage.output_tokens,
                max_tokens=self.request.stopping.max_new_tokens,
                e2e_s=self.times.clock() - self.times.arrived_at,
                queue_s=finished.timings.queue_s,
                prefill_s=finished.timings.prefill_s,
                decode_s=finished.timings.decode_s,
            ),
            num_choices=self.request.num_choices,
        )


def _revisions(started: Started | None) -> str:
    if started is None:
        return ""
    return ", ".join(started.adapter_revisions) or started.adapter_revision
