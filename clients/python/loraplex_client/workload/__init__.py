"""Workloads: which tenant asks for which adapter, and when.

There is one definition for the simulator, the benchmarks and `loraplex load`.

A `Trace` is a struct of numpy arrays, so that a million requests over a hundred thousand adapters cost memory and time
of arrays; `TraceRequest` is one row of it. Generators that reproduce a published workload keep its random generator and
the order of its draws.
"""

from loraplex_client.workload.bursts import burst, from_spec, poisson_rate
from loraplex_client.workload.conversations import ConversationShape, conversations
from loraplex_client.workload.measured import Measured
from loraplex_client.workload.popularity import POPULARITIES, punica_adapters, punica_sweep, zipf_adapters
from loraplex_client.workload.prompts import prompt_ids
from loraplex_client.workload.slora import SloraParams, slora_trace
from loraplex_client.workload.tenants import BurstyTenants, bursty_tenants, even_arrivals, on_off_pair, steady_clients
from loraplex_client.workload.trace import NO_ADAPTER, NO_CONVERSATION, Trace, TraceRequest, merge

__all__ = [
    "NO_ADAPTER",
    "NO_CONVERSATION",
    "POPULARITIES",
    "BurstyTenants",
    "ConversationShape",
    "Measured",
    "SloraParams",
    "Trace",
    "TraceRequest",
    "burst",
    "bursty_tenants",
    "conversations",
    "even_arrivals",
    "from_spec",
    "merge",
    "on_off_pair",
    "poisson_rate",
    "prompt_ids",
    "punica_adapters",
    "punica_sweep",
    "slora_trace",
    "steady_clients",
    "zipf_adapters",
]
