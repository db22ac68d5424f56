"""How many GPUs a load of adapters needs, found by simulation (docs/adr/0016-simulator.md)."""

from loraplex_client.plan.demand import Demand, DemandError, make_trace, read_lengths, read_popularity, read_ranks
from loraplex_client.plan.search import Plan, Trial, find_plan
from loraplex_client.plan.simulator import PlanError, Simulation, save_trace, simulate

__all__ = [
    "Demand",
    "DemandError",
    "Plan",
    "PlanError",
    "Simulation",
    "Trial",
    "find_plan",
    "make_trace",
    "read_lengths",
    "read_popularity",
    "read_ranks",
    "save_trace",
    "simulate",
]
