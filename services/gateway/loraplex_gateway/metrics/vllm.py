"""Requests as the gateway sees them, under the names that vLLM's dashboards read, by base model."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

from loraplex_common.tally import Tally, TallyCounter, TallyHistogram
from loraplex_common.vllm_metrics import (
    FINISHED_REASONS,
    FINISHED_SPECS,
    NUM_CHOICES,
    TTFT,
    FinishedRequest,
    HistogramSpec,
)

from loraplex_gateway.metrics.gaps import GapMetrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# Finish reasons under the names that vLLM's dashboards use; the others have no counterpart there.
_OUTCOMES: Final = {"cancelled": "abort"}


class VllmMetrics:
    """One `ModelMeter` per base model, made when it is first asked for.

    Args:
        registry: Where they are registered.

    Attributes:
        num_waiting: Requests that wait for a place on this gateway, by base model.
        gaps: Their tokens, and the gaps before them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> TallyCounter:
            return TallyCounter(name, text, ("model_name", *labels), registry=registry)

        self.num_waiting: collections.Counter[str] = collections.Counter()
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of started requests.")
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Of these, tokens that a cached prefix had.")
        self.queries = counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.hits = counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self.outcomes = counter("vllm:request_success", "Ended requests.", "finished_reason")
        self.histograms = {
            spec: TallyHistogram(spec.name, spec.text, ["model_name"], buckets=spec.buckets, registry=registry)
            for spec in (TTFT, NUM_CHOICES, *FINISHED_SPECS)
        }
        self.gaps = GapMetrics(registry)
        self._meters: dict[str, ModelMeter] = {}

    def of(self, model: str) -> ModelMeter:
        """Return the meter of a base model."""
        meter = self._meters.get(model)
        if meter is None:
            meter = self._meters[model] = ModelMeter(self, model)
        return meter


class ModelMeter:
    """Counts the requests of one base model.

    Attributes:
        gaps: Counts their tokens.
    """

    def __init__(self, metrics: VllmMetrics, model: str) -> None:
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._cached_tokens = metrics.cached_tokens.labels(model)
        self._queries = metrics.queries.labels(model)
        self._hits = metrics.hits.labels(model)
        self._model = model
        self._outcomes = metrics.outcomes
        for reason in FINISHED_REASONS:
            self._outcomes.labels(model, reason)
        self._histograms: dict[HistogramSpec, Tally] = {
            spec: histogram.labels(model) for spec, histogram in metrics.histograms.items()
        }
        self.gaps = metrics.gaps.of(model)

    def started(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """An engine has taken a request."""
        for counter in (self._prompt_tokens, self._queries):
            counter.inc(num_prompt_tokens)
        for counter in (self._cached_tokens, self._hits):
            counter.inc(num_cached_tokens)

    def first_tokens(self, num_tokens: int, wait_s: float) -> None:
        """A request's first tokens came together, ``wait_s`` seconds after its arrival."""
        self._histograms[TTFT].observe(wait_s)
        self.gaps.first(num_tokens)

    def finished(self, reason: str, request: FinishedRequest, *, num_choices: int) -> None:
        """A request ended well.

        Args:
            reason: Its finish reason, as the API has it in lower case.
            request: What it was like.
            num_choices: Choices of the call that it was the first of; 0 for the others.
        """
        self.ended(_OUTCOMES.get(reason, reason))
        for spec, value in request.observations():
            self._histograms[spec].observe(value)
        if num_choices:
            self._histograms[NUM_CHOICES].observe(num_choices)

    def ended(self, reason: str) -> None:
        """A request ended, with this value of ``finished_reason``."""
        self._outcomes.labels(self._model, reason).inc()
