"""What became of each request: one log line and its share of the metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger
from loraplex_common.vllm_metrics import FinishedRequest

from loraplex_gateway.types import Chunk, Finished, FinishReason, Started

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.errors import LoraplexError

    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.types import Event, GenerationRequest

# A client hangs up at its deadline, which by our clock may still be to come.
DEADLINE_MARGIN_S: Final = 0.05

_log = get_logger()


class RequestRecord:
    """Watches one request's events go by.

    Args:
        request: The request, its id filled in.
        tenant: Who asks.
        metrics: Where it is counted.
        clock: Monotonic seconds.
        time_left_s: Until the caller's deadline; None for no deadline.

    Attributes:
        model: Name of the base model, once known.
        adapter: Name of the adapter, once resolved: unknown names are no label.
        is_restricted: Whether not everybody may use that adapter.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        tenant: str,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
        time_left_s: float | None,
    ) -> None:
        self.model = ""
        self.adapter = ""
        self.is_restricted = False
        self._request = request
        self._tenant = tenant
        self._metrics = metrics
        self._clock = clock
        self._arrived_at = clock()
        self._time_left_s = time_left_s
        self._first_token_at: float | None = None
        self._last_token_at = 0.0
        self._started: Started | None = None
        self._finished: Finished | None = None
        self._num_tokens = 0
        self._num_resumed: int | None = None

    def resumes(self, request_id: str, *, num_tokens: int) -> None:
        """Note that this goes on with a stream that gave so many tokens: they and the prompt were counted there."""
        self._request = replace(self._request, request_id=request_id)
        self._num_tokens = self._num_resumed = num_tokens

    def see(self, event: Event, *, num_tokens: int) -> None:
        """Take note of an event; `num_tokens` is the output's length after it, whatever the chunk carries."""
        if isinstance(event, Started):
            self._started = event
            if self._num_resumed is None:
                self._metrics.vllm.of(self.model).started(event.prompt_tokens, event.cached_tokens)
        elif isinstance(event, Chunk):
            self._see_tokens(num_tokens)
        elif isinstance(event, Finished):
            self._finished = event
            self._num_tokens = event.usage.output_tokens

    def end(self, error: LoraplexError | None) -> None:
        """Log and count the request. Without `Finished` and without error the client went away, maybe at its deadline."""
        duration_s = self._clock() - self._arrived_at
        if error is not None:
            code, reason = error.code.name, error.reason
        elif self._finished is not None:
            code, reason = "OK", self._finished.finish_reason.name
        elif self._time_left_s is not None and duration_s >= self._time_left_s - DEADLINE_MARGIN_S:
            code, reason = "DEADLINE_EXCEEDED", "DEADLINE"
        else:
            code, reason = "CANCELLED", "CLIENT_GONE"
        self._count(code, reason)
        started, finished = self._started, self._finished
        _log.info(
            "request",
            request_id=self._request.request_id,
            trace_id=self._request.trace_id or self._request.request_id,
            tenant=self._tenant,
            model=self.model,
            adapter=self._request.adapter,
            adapter_revision=started.adapter_revision if started else "",
            engine_id=started.engine_id if started else "",
            code=code,
            reason=reason,
            error=error.message if error is not None else None,
            prompt_tokens=started.prompt_tokens if started else 0,
            cached_tokens=started.cached_tokens if started else 0,
            output_tokens=self._num_tokens,
            resumed_tokens=self._num_resumed,
            queue_s=round(finished.timings.queue_s, 4) if finished else None,
            ttft_s=round(self._first_token_at - self._arrived_at, 4) if self._first_token_at is not None else None,
            duration_s=round(duration_s, 4),
        )

    def _see_tokens(self, num_tokens: int) -> None:
        now = self._clock()
        num_new = num_tokens - self._num_tokens
        meter = self._metrics.vllm.of(self.model)
        if self._first_token_at is None:
            self._first_token_at = now
            if self._num_resumed:  # the first token was another stream's
                meter.further_tokens(num_new, (now - self._arrived_at) / max(num_new, 1))
            else:
                self._metrics.ttft.observe(now - self._arrived_at)
                meter.first_tokens(num_new, now - self._arrived_at)
        elif num_new > 0:
            gap_s = (now - self._last_token_at) / num_new
            self._metrics.itl.observe(gap_s)
            meter.further_tokens(num_new, gap_s)
        self._last_token_at = now
        self._num_tokens = num_tokens

    def _count(self, code: str, reason: str) -> None:
        metrics, started = self._metrics, self._started
        adapter = metrics.adapter_label(self.adapter, is_restricted=self.is_restricted)
        metrics.requests.labels(self.model, adapter, code).inc()
        if self.model:
            self._count_for_vllm(code)
        if code != "OK" or reason == FinishReason.CANCELLED.name:
            metrics.aborts.labels(reason).inc()
        is_first = started is not None and self._num_resumed is None
        metrics.count_tokens(
            self._tenant,
            num_input=started.prompt_tokens if started is not None and is_first else 0,
            num_output=self._num_tokens - (self._num_resumed or 0),
            num_cached=started.cached_tokens if started is not None and is_first else 0,
        )

    def _count_for_vllm(self, code: str) -> None:
        """Count the end of a request that was not refused, and what it was like if it ended well."""
        meter, finished = self._metrics.vllm.of(self.model), self._finished
        if code != "OK" or finished is None:
            meter.ended("abort" if code in ("CANCELLED", "DEADLINE_EXCEEDED") else "error")
            return
        meter.finished(
            finished.finish_reason.name.lower(),
            FinishedRequest(
                num_prompt_tokens=finished.usage.prompt_tokens,
                num_cached_tokens=finished.usage.cached_tokens,
                num_output_tokens=finished.usage.output_tokens,
                max_tokens=self._request.stopping.max_new_tokens,
                e2e_s=self._clock() - self._arrived_at,
                queue_s=finished.timings.queue_s,
                prefill_s=finished.timings.prefill_s,
                decode_s=finished.timings.decode_s,
            ),
            num_choices=self._request.num_choices,
        )
