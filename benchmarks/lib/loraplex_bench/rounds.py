"""Modes that are run in turn within each round, compared round by round."""

from __future__ import annotations

import math


def paired(base: list[dict[str, float]], other: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Return each round's share of throughput that is left, and the milliseconds that the first token comes later.

    The limit of a gateway is the one core of its event loop: what it computes per message says more than wall time on a
    machine that others share.
    """
    shares = [a["cpu_us_per_message"] / b["cpu_us_per_message"] for a, b in zip(base, other, strict=True)]
    return shares, [b["first_token_ms"] - a["first_token_ms"] for a, b in zip(base, other, strict=True)]


def spread(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, by the binomial distribution's normal approximation."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    return ordered[max(0, math.floor(middle - half))], ordered[min(len(values) - 1, math.ceil(middle + half))]
