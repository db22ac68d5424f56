"""The fewest GPUs whose simulation meets the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_client.plan.simulator import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Trial:
    """One fleet that was simulated: ``num_gpus`` GPUs in engines of equally many."""

    num_gpus: int
    simulation: Simulation


@dataclass(frozen=True, slots=True)
class Plan:
    """What the search found.

    Attributes:
        num_gpus: The fewest that meet the objective; None if ``max_gpus`` do not.
        trials: All fleets simulated, by size.
    """

    num_gpus: int | None
    trials: tuple[Trial, ...]


def find_plan(
    ask: Callable[[int], Simulation], *, attainment: float, max_gpus: int, first: int = 1, degree: int = 1
) -> Plan:
    """Double the number of engines until it meets the objective, then halve the interval.

    Attainment is taken to rise with the fleet; where noise makes it fall by a hair, the answer is one of the sizes at
    which it crosses.

    Args:
        ask: Simulates a fleet of that many engines.
        attainment: Share of requests that must meet their objectives.
        max_gpus: Largest fleet to try.
        first: How many engines to begin with.
        degree: GPUs of each engine; at most ``max_gpus``.
    """
    trials: dict[int, Trial] = {}
    most = max_gpus // degree

    def meets(size: int) -> bool:
        if size not in trials:
            trials[size] = Trial(size * degree, ask(size))
        return trials[size].simulation.attainment >= attainment

    failed, size = 0, min(max(1, first), most)
    while not meets(size):
        failed = size
        if size == most:
            return Plan(None, _sorted(trials))
        size = min(2 * size, most)
    while size - failed > 1:
        middle = (size + failed) // 2
        if meets(middle):
            size = middle
        else:
            failed = middle
    return Plan(size * degree, _sorted(trials))


def _sorted(trials: dict[int, Trial]) -> tuple[Trial, ...]:
    return tuple(trials[size] for size in sorted(trials))
