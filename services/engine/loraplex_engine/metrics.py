"""What the engine tells Prometheus about requests, under the names that routers and dashboards know.

Names are those of the Gateway API Inference Extension (``vllm:*``). Everything is counted on the asyncio side, from the
outputs on their way to the wire: the step loop spends nothing on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from prometheus_client import Counter

from loraplex_engine.histogram import ArrayHistogram
from loraplex_engine.messages import Ended, Started, StepOutputs, TokenWithLogprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0),
)
REQUEST_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# Finish reasons under the names that vLLM's dashboards use; the others have no counterpart there.
_OUTCOMES: Final = {"cancelled": "abort"}


class RequestMetrics:
    """Histograms and counters over requests.

    Args:
        registry: Where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS) -> ArrayHistogram:
            return ArrayHistogram(name, text, buckets, registry)

        self.ttft = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", ITL_BUCKETS)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.")
        self.queue = histogram("vllm:request_queue_time_seconds", "Waiting for a place in a batch.")
        self.prefill = histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.")
        self.decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.")
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of started requests.", registry=registry)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens generated.", registry=registry)
        self.outcomes = Counter("vllm:request_success", "Ended requests.", ["finished_reason"], registry=registry)
        self.errors = Counter("loraplex_engine_request_errors", "Failed requests.", ["reason"], registry=registry)

    def open_session(self) -> SessionMeter:
        """Return a meter for the requests of one session."""
        return SessionMeter(self)


class SessionMeter:
    """Follows the requests of one session from submission to end."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._arrived_s: dict[int, float] = {}
        self._last_token_s: dict[int, float] = {}
        self._num_prompt_tokens: dict[int, int] = {}

    def submitted(self, slot: int, num_prompt_tokens: int, now_s: float) -> None:
        """A request was handed to the step loop."""
        self._arrived_s[slot] = now_s
        self._num_prompt_tokens[slot] = num_prompt_tokens

    def record(self, outputs: StepOutputs, now_s: float) -> None:
        """Count what a step (or several merged ones) did."""
        for event in outputs.events:
            if isinstance(event, Started):
                self._metrics.prompt_tokens.inc(self._num_prompt_tokens.get(event.session_slot, 0))
        extra = [event.session_slot for event in outputs.events if isinstance(event, TokenWithLogprobs)]
        slots = outputs.token_slots if not extra else np.append(outputs.token_slots, np.asarray(extra, dtype=np.int32))
        if slots.size:
            self._tokens(slots, now_s)
        for event in outputs.events:
            if isinstance(event, Ended):
                self._ended(event, now_s)

    def close(self) -> None:
        """The session is gone; what still ran counts as aborted."""
        if self._arrived_s:
            self._metrics.outcomes.labels("abort").inc(len(self._arrived_s))
        self._arrived_s.clear()

    def _tokens(self, slots: NDArray[np.int32], now_s: float) -> None:
        metrics = self._metrics
        metrics.generation_tokens.inc(len(slots))
        unique, counts = np.unique(slots, return_counts=True)
        drawn = unique.tolist()
        last = np.array([self._last_token_s.get(slot, np.nan) for slot in drawn])
        is_first = np.isnan(last)
        if is_first.any():
            arrived = [self._arrived_s[slot] for slot, first in zip(drawn, is_first.tolist(), strict=True) if first]
            metrics.ttft.observe(now_s - np.asarray(arrived))
            counts[is_first] -= 1
            last[is_first] = now_s
        # Tokens of merged steps share the time since the message before.
        metrics.itl.observe(np.repeat((now_s - last) / np.maximum(counts, 1), counts))
        self._last_token_s.update(dict.fromkeys(drawn, now_s))

    def _ended(self, event: Ended, now_s: float) -> None:
        metrics, slot = self._metrics, event.session_slot
        self._last_token_s.pop(slot, None)
        self._num_prompt_tokens.pop(slot, None)
        arrived_s = self._arrived_s.pop(slot, None)
        if event.error is not None:
            metrics.errors.labels(event.error.reason).inc()
            metrics.outcomes.labels("error").inc()
            return
        reason = event.finish_reason.value if event.finish_reason is not None else "error"
        metrics.outcomes.labels(_OUTCOMES.get(reason, reason)).inc()
        if arrived_s is not None:
            metrics.e2e.observe(now_s - arrived_s)
            metrics.queue.observe(event.queue_s)
            metrics.prefill.observe(event.prefill_s)
            metrics.decode.observe(event.decode_s)
