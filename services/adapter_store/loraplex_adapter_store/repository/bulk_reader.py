"""Reads chunks from Valkey straight into memory that the caller has, in threads, over connections of its own.

The asyncio client makes a new `bytes` of each value and copies it twice on the way; for values of megabytes that takes
several times as long as to receive them. What does not go as planned here is left to that client, which names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import crc32c
from loraplex_common.valkey_errors import NO_ANSWER

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis import ConnectionPool

Arrived: TypeAlias = Callable[[int], bool]
"""Told, in the reading thread, up to where bytes have arrived and been checked; returns whether to go on."""

MAX_READERS: Final = 8
_AHEAD: Final = 2
"""Commands on their way beside the one whose answer is read."""
_LONGEST_HEAD: Final = 32


class BulkReader:
    """Reads blobs.

    Args:
        pool: Connections of the blocking client, protocol 2, without TLS.

    Attributes:
        executor: Its threads do the reading; they wait for nothing but Valkey.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self.executor = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="valkey-read")

    def read(
        self, digest: str, chunk_bytes: int, checksums: Sequence[int], out: memoryview[int], arrived: Arrived
    ) -> None:
        """Read the chunks of a blob in order, until one is missing, damaged, or Valkey does not answer; blocks.

        Args:
            digest: The blob.
            chunk_bytes: Bytes of each chunk but the last.
            checksums: crc32c of each chunk.
            out: Room for the blob, ``[num_bytes]``, bytes.
            arrived: See `Arrived`.
        """
        try:
            connection: Any = self._pool.get_connection()
        except NO_ANSWER:
            return
        names = [keys.chunk(digest, number) for number in range(len(checksums))]
        is_clean = False
        try:
            with contextlib.suppress(*NO_ANSWER):  # the reader of the rest finds out what is wrong
                is_clean = _read_all(connection, names, chunk_bytes, checksums, out, arrived)
        finally:
            if not is_clean:
                connection.disconnect()
            self._pool.release(connection)

    def close(self) -> None:
        """End the threads and connections; waits for reads under way."""
        self.executor.shutdown(cancel_futures=True)
        self._pool.disconnect()


def _read_all(
    connection: Any,
    names: Sequence[str],
    chunk_bytes: int,
    checksums: Sequence[int],
    out: memoryview[int],
    arrived: Arrived,
) -> bool:
    """Return whether all answers were read, so that the connection can be used again."""
    socket = connection._sock  # the library has no reading into memory of the caller's
    for name in names[:_AHEAD]:
        connection.send_packed_command(connection.pack_command("GET", name))
    for number, checksum in enumerate(checksums):
        if number + _AHEAD < len(names):
            connection.send_packed_command(connection.pack_command("GET", names[number + _AHEAD]))
        start = number * chunk_bytes
        chunk = out[start : start + chunk_bytes]
        if _line(socket) != b"$%d\r\n" % len(chunk):
            return False
        _receive(socket, chunk)
        is_right = _line(socket) == b"\r\n" and crc32c.crc32c(chunk) == checksum
        if not is_right or not arrived(start + len(chunk)):
            return False
    return True


def _line(socket: Any) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST_HEAD:
        part = socket.recv(1)
        if not part:
            raise ConnectionResetError("Valkey has closed the connection")
        line += part
    return line


def _receive(socket: Any, rest: memoryview[int]) -> None:
    while rest:
        num_bytes = socket.recv_into(rest)
        if not num_bytes:
            raise ConnectionResetError("Valkey has closed the connection")
        rest = rest[num_bytes:]
