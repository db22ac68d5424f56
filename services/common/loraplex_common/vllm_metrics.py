"""Histograms over requests under vLLM's names, defined once for engine and gateway, with the same arithmetic.

Names, meanings and most buckets are those of vLLM v1 (``vllm/v1/metrics/loggers.py``), so that its dashboards read ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINE_LABEL: Final = "0"
"""Label ``engine`` of an engine's own samples: vLLM numbers the engines of one process."""
FLEET_LABEL: Final = "all"
"""Label ``engine`` of a gateway's samples, which cover all engines of a base model."""
FINISHED_REASONS: Final = ("stop", "length", "abort", "error")
"""Values of ``finished_reason`` that vLLM also has, and that are shown before they occur."""

_REQUEST_SECONDS: Final = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKENS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_NUM_CHOICES: Final = (1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True, slots=True, eq=False)  # one object each, as keys of dictionaries with a fast hash
class HistogramSpec:
    """A histogram: name, help text and upper bounds of its buckets."""

    name: str
    text: str
    buckets: tuple[float, ...]


TTFT: Final = HistogramSpec(
    "vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
)
ITL: Final = HistogramSpec("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_SECONDS)
TPOT: Final = HistogramSpec(
    "vllm:time_per_output_token_seconds", "The same, under the name that vLLM has left behind.", _TOKEN_SECONDS
)
NUM_CHOICES: Final = HistogramSpec("vllm:request_params_n", "Choices that a call asks for.", _NUM_CHOICES)
E2E: Final = HistogramSpec("vllm:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_SECONDS)
QUEUE: Final = HistogramSpec("vllm:request_queue_time_seconds", "Waiting for a place in a batch.", _REQUEST_SECONDS)
PREFILL: Final = HistogramSpec(
    "vllm:request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_SECONDS
)
DECODE: Final = HistogramSpec("vllm:request_decode_time_seconds", "From the first token to the last.", _REQUEST_SECONDS)
INFERENCE: Final = HistogramSpec(
    "vllm:request_inference_time_seconds", "From the first step to the last token.", _REQUEST_SECONDS
)
REQUEST_TPOT: Final = HistogramSpec(
    "vllm:request_time_per_output_token_seconds", "Mean time between a request's tokens.", _TOKEN_SECONDS
)
PROMPT: Final = HistogramSpec("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
COMPUTED: Final = HistogramSpec(
    "vllm:request_prefill_kv_computed_tokens", "Prompt tokens that no cached prefix had.", _TOKENS
)
GENERATION: Final = HistogramSpec("vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS)
LONGEST: Final = HistogramSpec(
    "vllm:request_max_num_generation_tokens", "Longest output of a request; each choice counts as one.", _TOKENS
)
MAX_TOKENS: Final = HistogramSpec(
    "vllm:request_params_max_tokens", "Most tokens that a request asks for, where it says so.", _TOKENS
)

FINISHED_SPECS: Final = (
    *(E2E, QUEUE, PREFILL, DECODE, INFERENCE, REQUEST_TPOT),
    *(PROMPT, COMPUTED, GENERATION, LONGEST, MAX_TOKENS),
)  # fmt: skip
"""The histograms that `FinishedRequest` has values for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRequest:
    """The figures of a request that ended without an error.

    Attributes:
        max_tokens: The request's own limit on output tokens; None if it set none.
        e2e_s: Time from arrival to end.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    max_tokens: int | None
    e2e_s: float
    queue_s: float
    prefill_s: float
    decode_s: float

    def observations(self) -> Iterator[tuple[HistogramSpec, float]]:
        """Yield one value for each histogram that the request belongs in."""
        yield E2E, self.e2e_s
        yield QUEUE, self.queue_s
        yield PREFILL, self.prefill_s
        yield DECODE, self.decode_s
        yield INFERENCE, self.prefill_s + self.decode_s
        if self.num_output_tokens > 1:
            yield REQUEST_TPOT, self.decode_s / (self.num_output_tokens - 1)
        yield PROMPT, self.num_prompt_tokens
        yield COMPUTED, max(0, self.num_prompt_tokens - self.num_cached_tokens)
        yield GENERATION, self.num_output_tokens
        yield LONGEST, self.num_output_tokens
        if self.max_tokens is not None:
            yield MAX_TOKENS, self.max_tokens
