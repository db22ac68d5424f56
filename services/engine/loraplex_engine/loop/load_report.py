"""The engine's load, as threads other than the step loop's read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_engine.loop.engine_state import EngineState

RATE_WINDOW_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSnapshot:
    """The engine's load between two steps; fields as in engine.proto LoadReport.

    Attributes:
        pages_free: Pages that can be had at once, including those of cached blocks.
        pages_cached: The part of ``pages_free`` that holds cached blocks.
    """

    sequence: int
    running: int
    waiting: int
    queued_uncached_tokens: int
    pages_total: int
    pages_free: int
    pages_cached: int = 0
    pages_kv: int
    pages_adapter: int
    pages_pinned: int
    adapters_resident: int
    tokens_per_s: float
    draining: bool


@dataclass(frozen=True, slots=True)
class _Published:
    """One immutable reading; a reader takes the reference, so it needs no lock."""

    snapshot: LoadSnapshot
    at_s: float


class LoadReport:
    """The load, published by the step loop after each turn, read from any thread.

    ``tokens_per_s`` is an exponential average over `RATE_WINDOW_S`; it fades while no reading is published.
    """

    def __init__(self, state: EngineState, *, now_s: float) -> None:
        self._scheduler, self._pool, self._cache = state.scheduler, state.pool, state.cache
        self._num_tokens = 0
        self._published = _Published(self._measure(sequence=1, tokens_per_s=0.0), now_s)

    def publish(self, now_s: float) -> None:
        """Replace the reading; the sequence rises if anything except the token rate changed."""
        before = self._published
        drawn = self._scheduler.counters.num_output_tokens
        rate = _faded(before, now_s) + (drawn - self._num_tokens) / RATE_WINDOW_S
        self._num_tokens = drawn
        snapshot = self._measure(sequence=before.snapshot.sequence, tokens_per_s=before.snapshot.tokens_per_s)
        sequence = before.snapshot.sequence + (snapshot != before.snapshot)
        self._published = _Published(replace(snapshot, sequence=sequence, tokens_per_s=rate), now_s)

    def read(self, now_s: float) -> LoadSnapshot:
        """Return the latest reading."""
        published = self._published
        return replace(published.snapshot, tokens_per_s=_faded(published, now_s))

    def _measure(self, *, sequence: int, tokens_per_s: float) -> LoadSnapshot:
        scheduler, pool, cache = self._scheduler, self._pool, self._cache
        return LoadSnapshot(
            sequence=sequence,
            running=len(scheduler.batch),
            waiting=len(scheduler.queue),
            queued_uncached_tokens=scheduler.queue.num_tokens + scheduler.batch.num_prefill_tokens,
            pages_total=pool.num_pages,
            pages_free=pool.num_free + pool.num_retiring + pool.num_cached,
            pages_cached=pool.num_cached,
            pages_kv=pool.num_kv,
            pages_adapter=cache.ranking.num_idle_pages,
            pages_pinned=pool.num_adapter - cache.ranking.num_idle_pages,
            adapters_resident=cache.states.num_resident,
            tokens_per_s=tokens_per_s,
            draining=scheduler.is_draining,
        )


def _faded(published: _Published, now_s: float) -> float:
    return published.snapshot.tokens_per_s * math.exp(-max(0.0, now_s - published.at_s) / RATE_WINDOW_S)
