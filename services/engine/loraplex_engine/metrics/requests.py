"""Metrics of requests, under the names that routers and dashboards know.

Names are those of the Gateway API Inference Extension (``vllm:*``). Everything is counted on the asyncio side, from the
outputs on their way to the wire: the step loop spends nothing on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.vllm_metrics import FINISHED_REASONS, FINISHED_SPECS, ITL, TPOT, TTFT, FinishedRequest
from prometheus_client import Counter

from loraplex_engine.messages import Ended, Started, StepOutputs, TokenWithLogprobs
from loraplex_engine.metrics.histogram import ArrayHistogram

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

# Finish reasons under the names that vLLM's dashboards use; the others have no counterpart there.
_OUTCOMES: Final = {"cancelled": "abort"}


class RequestMetrics:
    """Histograms and counters over requests.

    Args:
        registry: The registry that the metrics are added to.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._histograms = {
            spec: ArrayHistogram(spec.name, spec.text, spec.buckets, registry)
            for spec in (TTFT, ITL, TPOT, *FINISHED_SPECS)
        }

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of started requests.")
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Of these, tokens that a cached prefix had.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.outcomes = counter("vllm:request_success", "Ended requests.", "finished_reason")
        self.errors = counter("loraplex_engine_request_errors", "Failed requests.", "reason")
        for reason in FINISHED_REASONS:
            self.outcomes.labels(reason)

    def open_session(self) -> SessionMeter:
        """Return a meter for the requests of one session."""
        return SessionMeter(self)

    def first_tokens(self, waits_s: NDArray[np.float64]) -> None:
        """Count the first tokens of requests, each with the seconds since its arrival."""
        self._histograms[TTFT].observe(waits_s)

    def further_tokens(self, gaps_s: NDArray[np.float64]) -> None:
        """Count further tokens, each with the seconds since the one before."""
        self._histograms[ITL].observe(gaps_s)
        self._histograms[TPOT].observe(gaps_s)

    def finished(self, request: FinishedRequest) -> None:
        """Count a request that ended without an error."""
        for spec, value in request.observations():
            self._histograms[spec].observe(value)


@dataclass(slots=True)
class _Open:
    """A request between its submission and its end."""

    arrived_s: float
    num_prompt_tokens: int
    max_tokens: int | None
    num_cached_tokens: int = 0
    num_tokens: int = 0
    last_token_s: float = float("nan")


class SessionMeter:
    """Follows the requests of one session from submission to end."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._open: dict[int, _Open] = {}

    def submitted(self, slot: int, num_prompt_tokens: int, now_s: float, max_tokens: int | None = None) -> None:
        """Note that a request was handed to the step loop; ``max_tokens`` is its own limit, if it sets one."""
        self._open[slot] = _Open(now_s, num_prompt_tokens, max_tokens)

    def record(self, outputs: StepOutputs, now_s: float) -> None:
        """Count the outputs of a step, or of several merged steps."""
        for event in outputs.events:
            if isinstance(event, Started):
                self._started(event)
        extra = [event.session_slot for event in outputs.events if isinstance(event, TokenWithLogprobs)]
        slots = outputs.token_slots if not extra else np.append(outputs.token_slots, np.asarray(extra, dtype=np.int32))
        if slots.size:
            self._tokens(slots, now_s)
        for event in outputs.events:
            if isinstance(event, Ended):
                self._ended(event, now_s)

    def close(self) -> None:
        """Count the requests that still ran as aborted, as the session is gone."""
        if self._open:
            self._metrics.outcomes.labels("abort").inc(len(self._open))
        self._open.clear()

    def _started(self, event: Started) -> None:
        request = self._open.get(event.session_slot)
        if request is not None:
            request.num_cached_tokens = event.cached_tokens
            self._metrics.prompt_tokens.inc(request.num_prompt_tokens)
            self._metrics.cached_tokens.inc(event.cached_tokens)

    def _tokens(self, slots: NDArray[np.int32], now_s: float) -> None:
        metrics = self._metrics
        metrics.generation_tokens.inc(len(slots))
        unique, counts = np.unique(slots, return_counts=True)
        drawn = [self._open[slot] for slot in unique.tolist()]
        last = np.array([request.last_token_s for request in drawn])
        for request, count in zip(drawn, counts.tolist(), strict=True):
            request.num_tokens += count
            request.last_token_s = now_s
        is_first = np.isnan(last)
        if is_first.any():
            arrived = [request.arrived_s for request, first in zip(drawn, is_first.tolist(), strict=True) if first]
            metrics.first_tokens(now_s - np.asarray(arrived))
            counts[is_first] -= 1
            last[is_first] = now_s
        # Tokens of merged steps share the time since the message before.
        metrics.further_tokens(np.repeat((now_s - last) / np.maximum(counts, 1), counts))

    def _ended(self, event: Ended, now_s: float) -> None:
        metrics = self._metrics
        request = self._open.pop(event.session_slot, None)
        if event.error is not None:
            metrics.errors.labels(event.error.reason).inc()
            metrics.outcomes.labels("error").inc()
            return
        reason = event.finish_reason.value if event.finish_reason is not None else "error"
        metrics.outcomes.labels(_OUTCOMES.get(reason, reason)).inc()
        if request is not None:
            metrics.finished(
                FinishedRequest(
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_cached_tokens=request.num_cached_tokens,
                    num_output_tokens=request.num_tokens,
                    max_tokens=request.max_tokens,
                    e2e_s=now_s - request.arrived_s,
                    queue_s=event.queue_s,
                    prefill_s=event.prefill_s,
                    decode_s=event.decode_s,
                )
            )
