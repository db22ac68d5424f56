"""Until when a request waits for an engine that takes it, where none does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_gateway.engines.pool import EnginePool

FIRST_WAIT_S: Final = 5.0
"""For an engine that is being dialled, of a request that no engine has had yet; the others wait as the pool says."""


def expected_until(
    pool: EnginePool, fingerprint: str, since: float, *, begun: str | None, is_first: bool, has_started: bool
) -> float:
    """Return until when an engine may come that takes a request; in the past if none is expected.

    Args:
        pool: The engines.
        fingerprint: The base model's, which the request asks for.
        since: When it began to look for an engine.
        begun: Numerics of the engine that its output began on, as `EnginePool.choose` takes them.
        is_first: Whether no engine has failed it yet.
        has_started: Whether its output has begun.
    """
    until = pool.expected_until(fingerprint, begun)
    if is_first:
        first = since + FIRST_WAIT_S if pool.is_expected(fingerprint, begun) else -math.inf
        until = max(until, first) if has_started else first
    if not has_started and not pool.has_engine(fingerprint):
        until = max(until, since + pool.arrival_wait_s)
    return until
