"""Keeps room for new gRPC connections: shortly before the limit, connections that have been quiet longest are ended.

At its limit, gRPC refuses every new connection even if all others are idle, and offers no way to end one. But its
sockets are descriptors of this process, and shutting one down looks to gRPC as if its peer had hung up.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOK_S: Final = 0.5
# If many descriptors turned out to be others, the next check may wait: it costs up to four system calls for each.
CALM_S: Final = 5.0
# Shares of the most connections: from the first share on, as many are ended as it takes to come down to the second.
FULL: Final = 0.9
ROOMY: Final = 0.8
_IN_DIRECTORY: Final = "/proc/self/fd"
_MAPPED: Final = "::ffff:"  # how a socket for both families names an IPv4 peer; gRPC names it as IPv4
# Offset in struct tcp_info: milliseconds since data last came; see linux/tcp.h.
_LAST_DATA_OFFSET: Final = 52

_log = get_logger()


class QuietConnections:
    """Ends unused connections of one port if others need their place.

    Args:
        port: Port of this process.
        max_connections: The allowed number.
        is_busy: Tells whether a peer, in gRPC's spelling, has a running call; its connection is never ended.
    """

    def __init__(self, port: int, max_connections: int, *, is_busy: Callable[[str], bool]) -> None:
        self._port = port
        self._max_connections = max_connections
        self._is_busy = is_busy

    async def run(self) -> None:
        """Check again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            if len(os.listdir(_IN_DIRECTORY)) < FULL * self._max_connections:
                continue
            if not await asyncio.to_thread(self.make_room):
                await asyncio.sleep(CALM_S - LOOK_S)

    def make_room(self) -> bool:
        """End quiet connections if there are almost too many; return whether there were. Takes 10 us a descriptor."""
        quiet = [(_silence_ms(connection), connection) for connection in self._connections()]
        num_open = len(quiet)
        num_ended = 0
        quiet.sort(key=lambda known: known[0], reverse=True)
        is_full = num_open >= FULL * self._max_connections
        for _, connection in quiet if is_full else []:
            if num_open - num_ended <= ROOMY * self._max_connections:
                break
            num_ended += self._end(connection)
        for _, connection in quiet:
            connection.close()
        if num_ended:
            _log.warning(
                "connections that were quiet gave way", port=self._port, num_open=num_open, num_ended=num_ended
            )
        return is_full

    def _end(self, connection: socket.socket) -> bool:
        try:
            if self._is_busy(_peer(connection)):
                return False
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the connection has ended by itself
            return False
        return True

    def _connections(self) -> Iterator[socket.socket]:
        """Yield an own handle on every connection of the port."""
        for entry in os.listdir(_IN_DIRECTORY):
            try:
                if not os.readlink(f"{_IN_DIRECTORY}/{entry}").startswith("socket:"):
                    continue
                # From here on the connection is read through an own descriptor: the other may be closed and reused
                # meanwhile.
                connection = socket.socket(fileno=os.dup(int(entry)))
            except OSError:  # closed meanwhile
                continue
            if self._is_ours(connection):
                yield connection
            else:
                connection.close()

    def _is_ours(self, connection: socket.socket) -> bool:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return False
        try:
            connection.getpeername()  # the listening socket has none
            return int(connection.getsockname()[1]) == self._port
        except OSError:
            return False


def _silence_ms(connection: socket.socket) -> int:
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_OFFSET + 4)
        return int(struct.unpack_from("I", info, _LAST_DATA_OFFSET)[0])
    except (OSError, struct.error):
        return 0


def _peer(connection: socket.socket) -> str:
    """Return a connection's peer as gRPC spells it."""
    host, port = connection.getpeername()[:2]
    if ":" not in host:
        return f"ipv4:{host}:{port}"
    if host.startswith(_MAPPED):
        return f"ipv4:{host.removeprefix(_MAPPED)}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
