"""A TCP relay before one server, for tests that count connections or cut them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES: Final = 65536
# SO_LINGER with no time: closing sends RST instead of FIN.
NO_LINGER: Final = struct.pack("ii", 1, 0)


class TcpRelay:
    """Passes bytes on in both directions.

    Args:
        upstream: ``host:port`` of the server.
        watch: Is told of all bytes, of both directions, as they come.

    Attributes:
        target: ``host:port`` to connect to, once it runs.
        num_connections: Connections so far.
    """

    def __init__(self, upstream: str, *, watch: Callable[[bytes], None] = lambda _data: None) -> None:
        self._watch = watch
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self.target = ""
        self.num_connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_open(self) -> int:
        """Sides of connections that pass bytes on now."""
        return len(self._open)

    def reset(self) -> None:
        """Cut every connection as a machine that went away does, with RST to both sides."""
        for writer in self._open:
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = {writer}
        try:
            up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
            writers.add(up_writer)
            self._open |= writers
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, up_writer))
                both.create_task(self._copy(up_reader, writer))
        finally:
            self._open -= writers
            for each in writers:
                each.close()
            self._tasks.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                self._watch(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
