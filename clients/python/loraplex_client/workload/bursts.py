"""Requests all at once, requests at a steady rate, and the short names of both."""

from __future__ import annotations

import numpy as np

from loraplex_client.workload.slora import SloraParams, slora_trace
from loraplex_client.workload.trace import NO_ADAPTER, Trace

_FORMS = "burst:N:R, slora:N:ALPHA:RATE:CV:DURATION or rate:N:RATE:DURATION"


def burst(num_adapters: int, num_requests: int, *, prompt_tokens: int = 256, output_tokens: int = 128) -> Trace:
    """Return requests that all arrive at 0; request i asks for adapter ``i mod num_adapters``, or for none if 0."""
    adapter = np.arange(num_requests) % num_adapters if num_adapters else NO_ADAPTER
    return Trace.of(np.zeros(num_requests), adapter=adapter, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def poisson_rate(
    num_adapters: int,
    rate: float,
    duration_s: float,
    *,
    prompt_tokens: int = 256,
    output_tokens: int = 128,
    seed: int = 7,
) -> Trace:
    """Return Poisson arrivals of requests for uniformly drawn adapters (none if ``num_adapters`` is 0)."""
    generator = np.random.RandomState(seed)  # the baselines' draws, in their order
    total = int(rate * duration_s)
    arrival_s = np.cumsum(generator.exponential(1 / rate, total))
    adapter = generator.randint(0, num_adapters, total) if num_adapters else NO_ADAPTER
    return Trace.of(arrival_s, adapter=adapter, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def from_spec(spec: str) -> Trace:
    """Return the workload of a short name: ``burst:N:R``, ``slora:N:ALPHA:RATE:CV:DURATION``, ``rate:N:RATE:DURATION``.

    Raises:
        ValueError: If it has none of these forms.
    """
    kind, *words = spec.split(":")
    try:
        match kind, [float(word) for word in words]:
            case "burst", [n, r]:
                return burst(int(n), int(r))
            case "slora", [n, alpha, rate, cv, duration_s]:
                return slora_trace(
                    SloraParams(num_adapters=int(n), alpha=alpha, rate=rate, cv=cv, duration_s=duration_s)
                )
            case "rate", [n, rate, duration_s]:
                return poisson_rate(int(n), rate, duration_s)
    except ValueError as error:
        raise ValueError(f"{spec!r} is not {_FORMS}: {error}") from error
    raise ValueError(f"{spec!r} is not {_FORMS}")
