"""What became of a trace's requests, and figures over them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.simulation.trace import TraceArrays


class End(enum.IntEnum):
    """How a request ended."""

    OPEN = 0  # it has not ended
    DONE = 1
    ABORTED = 2  # ended early: its deadline or objective could not be met
    REFUSED = 3


class Found(enum.IntEnum):
    """Where a request's adapter was when the request arrived."""

    BASE = 0  # the request has no adapter
    RESIDENT = 1
    COMING = 2  # asked for already, or being loaded
    IN_ARENA = 3
    MISSING = 4


class Outcomes:
    """One entry per request of a trace.

    Attributes:
        first_token_s: float64 ``[n]``; when the first token came, NaN if none did.
        end_s: float64 ``[n]``; NaN while open.
        load_s: float64 ``[n]``; time parked for its adapter.
        end: int8 ``[n]`` of `End`.
        found: int8 ``[n]`` of `Found`.
    """

    def __init__(self, num_requests: int) -> None:
        self.first_token_s = np.full(num_requests, np.nan)
        self.end_s = np.full(num_requests, np.nan)
        self.load_s = np.zeros(num_requests)
        self.end = np.zeros(num_requests, dtype=np.int8)
        self.found = np.zeros(num_requests, dtype=np.int8)

    def put(self, which: NDArray[np.bool_], other: Outcomes) -> None:
        """Take over the entries of ``other`` for the requests ``which``."""
        for name in ("first_token_s", "end_s", "load_s", "end", "found"):
            getattr(self, name)[which] = getattr(other, name)[which]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Figures of a replay.

    Attributes:
        wall_s: Virtual time from the first arrival to the last end.
        requests_per_s: Finished requests over ``wall_s``; ``output_tokens_per_s`` likewise.
        attainment: Share of all requests that met their objectives: that for the first token, and that for the pace of
            the others if there is one; aborted requests count as missed.
        ttft_s: Time to first token of the requests that got one: mean, p50, p90, p99.
        tpot_s: Time per output token after the first, of finished requests: mean, p50, p99.
        resident_share: Share of the requests with an adapter that found it on the device; ``arena_share``: in the arena
            or on its way; ``miss_share``: neither.
    """

    num_requests: int
    num_done: int
    num_aborted: int
    num_refused: int
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float
    attainment: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    load_mean_s: float
    resident_share: float
    arena_share: float
    miss_share: float


def summarize(trace: TraceArrays, outcomes: Outcomes, *, slo_ttft_s: float, slo_tpot_s: float | None = None) -> Summary:
    """Return the figures of a replay in which every request has ended."""
    done = outcomes.end == End.DONE
    ttft = outcomes.first_token_s - trace.arrival_s
    seen = ttft[~np.isnan(ttft)]
    wall = float(np.nanmax(outcomes.end_s) - trace.arrival_s[0])
    several = done & (trace.output_tokens > 1)
    pace = (outcomes.end_s - outcomes.first_token_s) / np.maximum(1, trace.output_tokens - 1)
    tpot = pace[several]
    is_met = ttft <= slo_ttft_s  # NaN, no first token, is False
    if slo_tpot_s is not None:
        is_met &= done & (pace <= slo_tpot_s)
    found = np.bincount(outcomes.found, minlength=len(Found))
    adapted = max(1, int(found[1:].sum()))
    return Summary(
        num_requests=len(done),
        num_done=int(done.sum()),
        num_aborted=int((outcomes.end == End.ABORTED).sum()),
        num_refused=int((outcomes.end == End.REFUSED).sum()),
        wall_s=wall,
        requests_per_s=float(done.sum() / wall) if wall else 0.0,
        output_tokens_per_s=float(trace.output_tokens[done].sum() / wall) if wall else 0.0,
        attainment=float(is_met.mean()),
        ttft_mean_s=_mean(seen),
        ttft_p50_s=_percentile(seen, 50),
        ttft_p90_s=_percentile(seen, 90),
        ttft_p99_s=_percentile(seen, 99),
        tpot_mean_s=_mean(tpot),
        tpot_p50_s=_percentile(tpot, 50),
        tpot_p99_s=_percentile(tpot, 99),
        load_mean_s=_mean(outcomes.load_s),
        resident_share=float(found[Found.RESIDENT] / adapted),
        arena_share=float((found[Found.IN_ARENA] + found[Found.COMING]) / adapted),
        miss_share=float(found[Found.MISSING] / adapted),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0
