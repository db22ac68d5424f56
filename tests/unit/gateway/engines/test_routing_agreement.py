"""The simulator sends requests where the gateway would.

Services do not import each other, so that the rule is written twice: in the gateway's routing and in the simulator's fleet.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import example, given
from hypothesis import strategies as st
from loraplex_engine.simulation import fleet
from loraplex_engine.simulation.trace import NO_ADAPTER
from loraplex_gateway.engines import routing

ADAPTER = 7
ENGINES = st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=2, max_size=6)


def simulators_choice(engines: list[tuple[int, bool]], adapter: int) -> int:
    """Return the number of the engine that the simulator sends a request to."""
    made: Any = object.__new__(fleet.Fleet)  # without the engines' simulation, which no choice depends on
    made.engines = [SimpleNamespace(load=load, holds=lambda _, holds=holds: holds) for load, holds in engines]
    made._routing = fleet.Routing.AFFINITY
    return cast("fleet.Fleet", made)._choose(adapter)


def gateways_choice(engines: list[tuple[int, bool]], adapter: int) -> int:
    """Return the number of the engine that the gateway sends it to."""
    digest = "" if adapter == NO_ADAPTER else "a" * 64
    candidates = [
        routing.Candidate(engine_id=str(number), load=load, missing_bytes=0 if holds or not digest else 1)
        for number, (load, holds) in enumerate(engines)
    ]
    chosen = routing.choose(candidates, adapters=digest, affinity_key="")
    assert chosen is not None
    return int(chosen)


def test_both_have_the_same_constants() -> None:
    assert (fleet.WARM_LOAD_FACTOR, fleet.WARM_LOAD_SLACK) == (routing.WARM_LOAD_FACTOR, routing.WARM_LOAD_SLACK)


@given(ENGINES)
@example([(0, False), (routing.WARM_LOAD_SLACK, True)])  # just not too busy
@example([(0, False), (routing.WARM_LOAD_SLACK + 1, True)])
@example([(8, False), (16, True)])
def test_both_send_a_request_of_an_adapter_to_an_equally_good_engine(engines: list[tuple[int, bool]]) -> None:
    # Each takes, among equal engines, the adapter's home by a hash of its own: which one it is does not matter.
    assert engines[simulators_choice(engines, ADAPTER)] == engines[gateways_choice(engines, ADAPTER)]


@given(ENGINES)
def test_both_send_a_request_of_the_base_model_to_an_equally_loaded_engine(engines: list[tuple[int, bool]]) -> None:
    simulated, routed = simulators_choice(engines, NO_ADAPTER), gateways_choice(engines, NO_ADAPTER)

    assert engines[simulated][0] == engines[routed][0]


def test_both_keep_a_cold_adapter_to_one_engine_of_equals() -> None:
    equals = [(3, False)] * 5
    for choice in (simulators_choice, gateways_choice):
        assert len({choice(equals, ADAPTER) for _ in range(3)}) == 1
        assert choice([(3, False), (2, False), *equals], ADAPTER) == 1
