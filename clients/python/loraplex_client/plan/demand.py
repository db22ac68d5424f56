"""What is asked of a deployment, as a trace of requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_client.workload import NO_ADAPTER, Trace, zipf_adapters

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LENGTHS: Final = re.compile(r"(\d+)(?::(\d+))?")


class DemandError(ValueError):
    """A demand that no trace can have; the message names the option."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Poisson-like arrivals over adapters of some popularity.

    Attributes:
        rate: Requests per second.
        cv: Coefficient of variation of the gaps; 1 is Poisson, more is bursty.
        popularity: ``uniform``, ``zipf`` or ``power`` (S-LoRA's), with ``exponent`` for the last two.
        prompt: Half-open range of uniform prompt lengths; ``output`` of answers.
        num_requests: Length of the trace.
        base_share: Share of requests without an adapter.
    """

    num_adapters: int
    rate: float
    cv: float = 1.0
    popularity: str = "zipf"
    exponent: float = 1.0
    prompt: tuple[int, int] = (8, 512)
    output: tuple[int, int] = (8, 512)
    num_requests: int = 4000
    base_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_adapters < 0 or self.num_requests < 1:
            raise DemandError("--adapters must not be negative, --requests at least 1")
        if not (self.rate > 0 and self.cv > 0):
            raise DemandError("--rate and --cv must be above 0")
        if not 0 <= self.base_share <= 1:
            raise DemandError("--base-share must be in 0..1")


def read_lengths(text: str, option: str) -> tuple[int, int]:
    """Return the half-open range of ``LOW:HIGH``, or of one length ``N``.

    Raises:
        DemandError: If the text is neither, or allows a length of 0.
    """
    match = _LENGTHS.fullmatch(text)
    low = int(match[1]) if match else 0
    high = (int(match[2]) if match[2] else low + 1) if match else 0
    if not 1 <= low < high:
        raise DemandError(f"{option} {text!r} is neither N nor LOW:HIGH with 1 <= LOW < HIGH")
    return low, high


def read_ranks(text: str) -> list[int]:
    """Return the ranks of ``R,R,...``.

    Raises:
        DemandError: If the text is no list of numbers above 0.
    """
    try:
        ranks = [int(word) for word in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise DemandError(f"--ranks {text!r} is no list of numbers above 0")
    return ranks


def read_popularity(text: str) -> tuple[str, float]:
    """Return kind and exponent of ``uniform``, ``zipf[:S]`` or ``power[:ALPHA]``.

    Raises:
        DemandError: If the text is none of these.
    """
    kind, _, exponent = text.partition(":")
    if kind == "uniform" and not exponent:
        return kind, 1.0
    try:
        value = float(exponent or 1.0)
    except ValueError:
        value = 0.0
    if kind not in ("zipf", "power") or not value > 0:
        raise DemandError(f"--popularity {text!r} is not uniform, zipf[:S] or power[:ALPHA] with a number above 0")
    return kind, value


def make_trace(demand: Demand) -> Trace:
    """Draw the requests; the same demand gives the same trace."""
    generator = np.random.default_rng(demand.seed)
    count, variance = demand.num_requests, demand.cv * demand.cv
    arrival_s = np.cumsum(generator.gamma(1 / variance, variance / demand.rate, count))
    adapter = _adapters(demand, generator)
    adapter[generator.random(count) < demand.base_share] = NO_ADAPTER
    return Trace.of(
        arrival_s,
        adapter=adapter,
        prompt_tokens=generator.integers(*demand.prompt, count),
        output_tokens=generator.integers(*demand.output, count),
    )


def _adapters(demand: Demand, generator: np.random.Generator) -> NDArray[np.int32]:
    count = demand.num_requests
    if demand.num_adapters == 0:
        return np.full(count, NO_ADAPTER, dtype=np.int32)
    if demand.popularity == "zipf":
        return zipf_adapters(demand.num_adapters, count, exponent=demand.exponent, generator=generator)
    exponent = demand.exponent if demand.popularity == "power" else 1.0
    adapters: NDArray[np.int32] = (generator.power(exponent, count) * demand.num_adapters).astype(np.int32)
    return adapters
