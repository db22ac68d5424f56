"""Ports that several processes of one gateway listen on, and no other program."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from loraplex_common.ports import require_free

if TYPE_CHECKING:
    from collections.abc import Mapping


class SharedPorts:
    """Holds ports for as long as it is open; processes of this user may listen on them with SO_REUSEPORT.

    SO_REUSEPORT alone would let a second gateway join the first without a word, and get half of its connections. So a port
    is taken only if no program listens on it, and a name that only one process can have keeps out a gateway that
    starts at the same moment. A socket that is bound and does not listen gets no connection, and keeps others from the
    port while no worker listens.

    Args:
        host: Address to listen on.
        ports: Flag that changes a port -> port; 0 picks a free one.

    Attributes:
        numbers: Flag -> port.

    Raises:
        OSError: If a port is taken; the message names it and the flag.
    """

    def __init__(self, host: str, ports: Mapping[str, int]) -> None:
        self.numbers: dict[str, int] = {}
        self._sockets: list[socket.socket] = []
        try:
            for flag, port in ports.items():
                require_free(host, {flag: port})
                self.numbers[flag] = self._hold(host, port)
                self._claim(host, self.numbers[flag], flag)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Give the ports back."""
        for each in self._sockets:
            each.close()
        self._sockets.clear()

    def _hold(self, host: str, port: int) -> int:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        holder = socket.socket(family, kind, protocol)
        self._sockets.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # lingering connections are no obstacle
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # from now on no other program may listen here
        return int(holder.getsockname()[1])

    def _claim(self, host: str, port: int, flag: str) -> None:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sockets.append(claim)
        try:
            claim.bind(f"\0loraplex-gateway {host} {port}")  # a name of the kernel's, gone with this process
        except OSError as error:
            raise OSError(f"port {port} of {host} is taken by another gateway: choose another with {flag}") from error
