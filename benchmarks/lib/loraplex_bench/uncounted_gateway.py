"""A gateway whose metrics count nothing: what counting costs is the difference to one of ours.

Usage: ``python -m loraplex_bench.uncounted_gateway`` with the gateway's own flags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import prometheus_client
from loraplex_common.tally import Count, Tally
from loraplex_gateway.__main__ import main
from loraplex_gateway.metrics.gaps import Gaps
from loraplex_gateway.metrics.top_usage import TopUsage

if TYPE_CHECKING:
    from collections.abc import Callable


def forget(*_: object, **__: object) -> None:
    """Count nothing."""


COUNTING: tuple[tuple[type, str], ...] = (
    (prometheus_client.Counter, "inc"),
    (prometheus_client.Gauge, "inc"),
    (prometheus_client.Gauge, "dec"),
    (prometheus_client.Gauge, "set"),
    (prometheus_client.Histogram, "observe"),
    (Count, "inc"),
    (Tally, "observe"),
    (Gaps, "first"),
    (Gaps, "further"),
    (Gaps, "resumed"),
    (TopUsage, "add"),
)


def stop_counting(nothing: Callable[..., None] = forget) -> None:
    """Let everything that counts do nothing, in this process."""
    for kind, method in COUNTING:
        assert callable(getattr(kind, method))
        setattr(kind, method, nothing)


if __name__ == "__main__":
    stop_counting()
    main()
