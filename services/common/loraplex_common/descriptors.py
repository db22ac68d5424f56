"""How many files and connections this process may have open."""

from __future__ import annotations

import resource
from typing import Final

# For what a service opens itself (Valkey, peers, files, threads' pipes), and for the connections of one turn of the event
# loop, which are accepted before they can be counted.
RESERVED: Final = 448


def raise_limit() -> int:
    """Raise the process's limit on open descriptors as far as it may be raised, and return it.

    The soft limit is often 1,024 for the sake of programs that use select(), which none here does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connections_per_port(wanted: int, *, num_ports: int) -> int:
    """Return how many connections each of a process's ports may have, so that descriptors never run out.

    Args:
        wanted: At most as many.
        num_ports: Ports of this process that strangers connect to.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (limit - RESERVED) // num_ports))
