"""Metrics of adapters: their states, how long they take to come, and why they leave."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Histogram

from loraplex_engine.messages import ResidencyChanged, ResidencyState

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

LOAD_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STATE = ResidencyState
_LEFT_DEVICE: Final = {_STATE.RESIDENT: "pressure", _STATE.DRAINING: "request"}


class ResidencyMetrics:
    """Follows each adapter from event to event.

    Args:
        registry: The registry that the metrics are added to.

    Attributes:
        changed_at: Unix time at which an adapter was last wanted, became resident or left.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._loads = Counter(
            "loraplex_engine_adapter_loads", "Adapters asked for, by what became of it.", ["outcome"], registry=registry
        )
        self._stages = Histogram(
            "loraplex_engine_adapter_load_seconds",
            "Time to get an adapter: `store` until its image is in the arena, `copy` from there to the device.",
            ["stage"],
            buckets=LOAD_BUCKETS,
            registry=registry,
        )
        self._total = Histogram(
            "vllm:lora_adapter_load_seconds",
            "From the moment an adapter is asked for until it can compute.",
            buckets=LOAD_BUCKETS,
            registry=registry,
        )
        self._evictions = Counter(
            "loraplex_engine_adapter_evictions",
            "Adapters that left: the device under `pressure` or on `request`, or the `arena`.",
            ["cause"],
            registry=registry,
        )
        for outcome in ("loaded", "refused"):
            self._loads.labels(outcome)
        for cause in ("pressure", "request", "arena"):
            self._evictions.labels(cause)
        self._previous: dict[str, tuple[ResidencyState, float]] = {}
        self._asked_s: dict[str, float] = {}
        self.changed_at = time.time()

    def changed(self, event: ResidencyChanged, now_s: float) -> None:
        """Count one event that happened at ``now_s`` (monotonic)."""
        state, since_s = self._previous.get(event.digest, (_STATE.ABSENT, now_s))
        if event.state is state:
            return
        self.changed_at = time.time()
        self._count_load(event, state, since_s, now_s)
        if state in _LEFT_DEVICE and event.state in (_STATE.IN_ARENA, _STATE.ABSENT):
            self._evictions.labels(_LEFT_DEVICE[state]).inc()
        elif state is _STATE.IN_ARENA and event.state is _STATE.ABSENT:
            self._evictions.labels("arena").inc()
        if event.state is _STATE.ABSENT:
            self._previous.pop(event.digest, None)
            self._asked_s.pop(event.digest, None)
        else:
            self._previous[event.digest] = (event.state, now_s)

    def _count_load(self, event: ResidencyChanged, state: ResidencyState, since_s: float, now_s: float) -> None:
        digest = event.digest
        match state, event.state:
            case (_, _STATE.WANTED):
                self._asked_s[digest] = now_s
            case (_STATE.WANTED, _STATE.IN_ARENA):
                self._stages.labels("store").observe(now_s - since_s)
            case (_STATE.WANTED, _STATE.ABSENT):
                self._loads.labels("refused").inc()
            case (_, _STATE.LOADING):
                self._asked_s.setdefault(digest, now_s)
            case (_STATE.LOADING, _STATE.RESIDENT):
                self._stages.labels("copy").observe(now_s - since_s)
                self._total.observe(now_s - self._asked_s.pop(digest, since_s))
                self._loads.labels("loaded").inc()
