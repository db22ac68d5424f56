"""Tenants that share an engine: the VTC paper's evenly spaced clients, on and off, and bursty ones.

Source: Sheng et al., "Fairness in Serving Large Language Models", arXiv:2401.00588, section 5, and its artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loraplex_client.workload.trace import Trace, merge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def even_arrivals(rate: float, duration_s: float) -> NDArray[np.float64]:
    """Return ``int(rate * duration_s)`` arrivals, the first at 0, ``1 / rate`` apart."""
    return np.arange(int(rate * duration_s)) / rate


def steady_clients(
    rates: Sequence[float], duration_s: float, *, prompt_tokens: int = 256, output_tokens: int = 256
) -> Trace:
    """Return evenly spaced requests; client i has tenant i, adapter i and ``rates[i]`` requests per second.

    The paper's: ``(1.5, 3)`` for 360 s; eight clients of ``(0.4,) * 3 + (0.6,) * 5``.
    """
    return merge(
        *(
            Trace.of(
                even_arrivals(rate, duration_s),
                adapter=client,
                tenant=client,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
            )
            for client, rate in enumerate(rates)
        )
    )


def on_off_pair(
    *,
    rates: tuple[float, float] = (2.0, 3.0),
    duration_s: float = 600.0,
    window_s: float = 60.0,
    prompt_tokens: int = 256,
    output_tokens: int = 256,
) -> Trace:
    """Return two steady clients of which the first is silent in every odd window."""
    trace = steady_clients(rates, duration_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    is_odd = np.floor(trace.arrival_s / window_s).astype(np.int64) % 2 == 1
    return trace.select(~(is_odd & (trace.tenant == 0)))


@dataclass(frozen=True, kw_only=True, slots=True)
class BurstyTenants:
    """Tenants that fall silent: each has phases of Poisson requests and phases without any.

    Attributes:
        num_tenants: Tenants, independent of each other.
        adapters_per_tenant: Tenant t owns adapters ``[t * n, (t + 1) * n)`` and draws uniformly among them.
        rate_on: Requests per second of one tenant while it is on.
        mean_on_s: Mean length of an exponential phase with requests.
        mean_off_s: Mean length of an exponential phase without.
        prompt_range: Half-open range of uniform prompt lengths; ``output_range`` likewise.
    """

    num_tenants: int
    duration_s: float
    rate_on: float
    mean_on_s: float = 10.0
    mean_off_s: float = 50.0
    adapters_per_tenant: int = 1
    prompt_range: tuple[int, int] = (8, 512)
    output_range: tuple[int, int] = (8, 512)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_tenants, self.adapters_per_tenant) < 1:
            raise ValueError("tenants and adapters must be at least one")
        if min(self.duration_s, self.rate_on, self.mean_on_s, self.mean_off_s) <= 0:
            raise ValueError("duration, rate and phases must be above 0")


def bursty_tenants(params: BurstyTenants) -> Trace:
    """Return the requests of tenants that go on and off.

    Arrivals are drawn on a clock that only runs while a tenant is on, then spread over its phases.
    """
    generator = np.random.default_rng(params.seed)
    arrivals, tenants = [], []
    for tenant in range(params.num_tenants):
        arrival_s = _phased_arrivals(params, generator)
        arrivals.append(arrival_s)
        tenants.append(np.full(len(arrival_s), tenant, dtype=np.int32))
    arrival_s, tenant_of = np.concatenate(arrivals), np.concatenate(tenants)
    total = len(arrival_s)
    own = generator.integers(0, params.adapters_per_tenant, total)
    return Trace.of(
        arrival_s,
        adapter=tenant_of * params.adapters_per_tenant + own,
        tenant=tenant_of,
        prompt_tokens=generator.integers(*params.prompt_range, total),
        output_tokens=generator.integers(*params.output_range, total),
    )


def _phased_arrivals(params: BurstyTenants, generator: np.random.Generator) -> NDArray[np.float64]:
    share_on = params.mean_on_s / (params.mean_on_s + params.mean_off_s)
    is_on = generator.random() < share_on
    begins, lengths, now_s = list[float](), list[float](), 0.0
    while now_s < params.duration_s:
        length_s = generator.exponential(params.mean_on_s if is_on else params.mean_off_s)
        if is_on:
            begins.append(now_s)
            lengths.append(min(length_s, params.duration_s - now_s))
        now_s += length_s
        is_on = not is_on
    on_begins = np.concatenate([[0.0], np.cumsum(lengths)])  # of each phase on the clock that only runs while on
    on_s = np.sort(generator.random(generator.poisson(params.rate_on * on_begins[-1]))) * on_begins[-1]
    phase = np.searchsorted(on_begins, on_s, side="right") - 1
    return np.array(begins)[phase] + on_s - on_begins[phase] if len(on_s) else np.empty(0)
