"""HTTP connections: a bounded number, and no idle one keeps a place that a new one needs."""

from __future__ import annotations

import math
import random
from typing import Final

from loraplex_gateway.openai.http_protocol import BoundedProtocol

# From the connection, or from the first byte of a further request, until its header is whole.
HEADER_S: Final = 10.0
# Share of a connection's age by which it ends earlier or later: connections that began together do not end together.
JITTER: Final = 0.1


class Connections:
    """Every open connection, the one that has been quiet longest first.

    Args:
        max_connections: With as many open, a new one takes the place of the longest quiet one; with none quiet it is closed.
        header_s: How long a request's header may take.
        max_age_s: A request that comes later on its connection is the last there; 0 for never.
    """

    def __init__(self, max_connections: int, *, header_s: float = HEADER_S, max_age_s: float = 0.0) -> None:
        self.header_s = header_s
        self._max_age_s = max_age_s
        self._max_connections = max_connections
        self._open: dict[BoundedProtocol, None] = {}

    @property
    def num_open(self) -> int:
        """Connections that are open."""
        return len(self._open)

    def age_s(self) -> float:
        """Return how old a new connection may become."""
        return self._max_age_s * random.uniform(1 - JITTER, 1 + JITTER) if self._max_age_s else math.inf

    def protocol(self) -> type[BoundedProtocol]:
        """Return the class of these connections' protocols, of which uvicorn makes one each."""
        connections = self

        class Protocol(BoundedProtocol):
            book = connections

        return Protocol

    def opened(self, protocol: BoundedProtocol) -> None:
        """Enter a new connection, at the cost of another one or of itself."""
        if len(self._open) >= self._max_connections:
            quiet = next((known for known in self._open if not known.is_busy), protocol)
            self._open.pop(quiet, None)
            quiet.transport.abort()
            if quiet is protocol:
                return
        self._open[protocol] = None

    def heard(self, protocol: BoundedProtocol) -> None:
        """Note that a connection has said something."""
        if protocol in self._open:
            del self._open[protocol]
            self._open[protocol] = None  # behind all others

    def closed(self, protocol: BoundedProtocol) -> None:
        """Forget a connection."""
        self._open.pop(protocol, None)
