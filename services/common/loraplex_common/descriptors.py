"""How many files and connections this process may have open."""

from __future__ import annotations

import resource
from typing import Final

# Descriptors for what a service opens itself (Valkey, peers, files, threads' pipes), and for the connections of one
# turn of the event loop, which are accepted before they can be counted.
RESERVED: Final = 448


def raise_limit() -> int:
    """Raise the process's limit on open descriptors to its maximum, and return it.

    The soft limit is often 1,024 because of programs that use select(); no code here uses it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connections_per_port(wanted: int, *, num_ports: int) -> int:
    """Return how many connections each of a process's ports may have, so that descriptors never run out.

    Args:
        wanted: Upper limit of the result.
        num_ports: Ports of this process that clients connect to.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (limit - RESERVED) // num_ports))
