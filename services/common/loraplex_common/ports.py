"""Checks whether a port is free before any expensive work starts. Standard library only."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def problem_of(host: str, port: int) -> str | None:
    """Return why no server can listen on ``host:port``, e.g. ``is taken by ...``; None if one can, or for port 0."""
    if port == 0:
        return None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"cannot be listened on: {error.strerror}"
    problems = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # The same option as servers use: lingering connections of an earlier server are no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is taken by another process"
            problems.append(f"cannot be listened on: {error.strerror}")
    # A name may have addresses that this machine lacks, such as ::1; one usable address is enough.
    return problems[0] if len(problems) == len(addresses) else None


def require_free(host: str, ports: Mapping[str, int]) -> None:
    """Check a service's ports before it loads anything.

    Args:
        host: Address it listens on.
        ports: Flag that changes a port -> port.

    Raises:
        OSError: If a port cannot be listened on; the message names port and flag.
    """
    for flag, port in ports.items():
        if problem := problem_of(host, port):
            raise OSError(f"port {port} of {host} {problem}: choose another with {flag}")
