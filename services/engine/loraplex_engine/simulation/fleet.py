"""Several engines of one base model, and the rule by which each request goes to one of them."""

from __future__ import annotations

import enum
import gc
import math
import random
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.simulation.engine import SimulatedEngine
from loraplex_engine.simulation.outcomes import Outcomes
from loraplex_engine.simulation.trace import NO_ADAPTER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from loraplex_engine.simulation.adapters import Adapters
    from loraplex_engine.simulation.setup import SimulationSetup
    from loraplex_engine.simulation.trace import TraceArrays

# The gateway's rule (loraplex_gateway.engines.routing): services do not import each other, so its two numbers are repeated here.
WARM_LOAD_FACTOR: Final = 1.5
WARM_LOAD_SLACK: Final = 4


class Routing(enum.Enum):
    """How requests are spread."""

    AFFINITY = "affinity"  # as the gateway does: the least loaded engine that has the adapter, unless it is much busier
    RANDOM = "random"


class Fleet:
    """Engines that share a trace.

    Args:
        setup: Setup of each engine.
        num_engines: Number of engines.
        watch: Passed to every engine.

    Attributes:
        engines: All of them.
    """

    def __init__(
        self,
        setup: SimulationSetup,
        adapters: Adapters,
        trace: TraceArrays,
        *,
        num_engines: int = 1,
        routing: Routing = Routing.AFFINITY,
        watch: Callable[[SimulatedEngine], None] | None = None,
    ) -> None:
        if num_engines < 1:
            raise ValueError(f"{num_engines} engines serve no request")
        self.engines = [SimulatedEngine(setup, adapters, trace, watch=watch) for _ in range(num_engines)]
        self._trace = trace
        self._routing = routing
        self._random = random.Random(0)

    def run(self) -> Outcomes:
        """Replay the whole trace and return its outcomes; the engines are closed.

        Raises:
            StalledError: If a request can never end.
        """
        took = np.zeros(len(self._trace.arrival_s), dtype=np.intp)
        try:
            with _without_cycle_search():
                self._replay(took)
        finally:
            for engine in self.engines:
                engine.close()
        outcomes = Outcomes(len(took))
        for number, engine in enumerate(self.engines):
            outcomes.put(took == number, engine.outcomes)
        return outcomes

    def _replay(self, took: NDArray[np.intp]) -> None:
        """Replay the whole trace and note in ``took`` which engine took each request."""
        adapters = self._trace.adapter.tolist()
        for index, arrival_s in enumerate(self._trace.arrival_s.tolist()):
            for engine in self.engines:
                engine.advance(arrival_s)
            took[index] = chosen = self._choose(adapters[index])
            self.engines[chosen].push(index)
        for engine in self.engines:
            engine.advance(math.inf)

    def _choose(self, adapter: int) -> int:
        engines = self.engines
        if len(engines) == 1:
            return 0
        if self._routing is Routing.RANDOM:
            return self._random.randrange(len(engines))
        loads = [engine.load for engine in engines]
        limit = min(loads) * WARM_LOAD_FACTOR + WARM_LOAD_SLACK
        candidates = range(len(engines))
        if adapter != NO_ADAPTER:
            warm = [number for number in candidates if loads[number] <= limit and engines[number].holds(adapter)]
            return min(warm or candidates, key=lambda number: (loads[number], -_weight(adapter, number)))
        return min(candidates, key=lambda number: loads[number])


@contextmanager
def _without_cycle_search() -> Iterator[None]:
    """Switch off the search for reference cycles: a replay makes none, and each search looks at all its objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _weight(adapter: int, engine: int) -> int:
    """Return an engine's rendezvous weight for an adapter."""
    return zlib.crc32(f"{adapter}/{engine}".encode())
