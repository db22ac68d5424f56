"""Writes chunks to Valkey out of the memory that they lie in, in threads, over connections of its own.

The asyncio client joins a command and copies what a socket does not take at once, several times for a value of megabytes, and
waits for each answer before it sends the next one. Here Valkey stores a chunk while the next one is checksummed and sent. What
does not go as planned is left to that client, which names it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.valkey_errors import NO_ANSWER

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from redis import ConnectionPool

    from loraplex_adapter_store.repository.blob_tier import Chunk

MAX_WRITERS: Final = 4
_AHEAD: Final = 1
"""Chunks that are sent before the answer to the one before them is read."""
_MAX_VIEWS: Final = 512
"""Views that are sent as they are; a call to the system takes 1024."""
_STORED: Final = b"+OK\r\n"


class BulkWriter:
    """Writes blobs.

    Args:
        pool: Connections of the blocking client, protocol 2, without TLS.

    Attributes:
        executor: Its threads do the writing; they wait for nothing but Valkey.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self.executor = ThreadPoolExecutor(MAX_WRITERS, thread_name_prefix="valkey-write")

    def write(self, digest: str, left: Unwritten, is_stopped: Callable[[], bool]) -> None:
        """Write chunks in order until one is not stored, or it is told to stop; blocks.

        Args:
            digest: The blob.
            left: Its chunks; empty at the end if all went well. What making them raises, this raises.
            is_stopped: Asked before each chunk.
        """
        try:
            connection: Any = self._pool.get_connection()
        except NO_ANSWER:
            return
        is_clean = False
        try:
            with contextlib.suppress(*NO_ANSWER):  # the writer of the rest finds out what is wrong
                is_clean = _write_all(connection, digest, left, is_stopped)
        finally:
            if not is_clean:
                connection.disconnect()
            self._pool.release(connection)

    def close(self) -> None:
        """End the threads and connections; waits for writes under way."""
        self.executor.shutdown(cancel_futures=True)
        self._pool.disconnect()


class Unwritten:
    """The chunks of a blob that are not known to be stored.

    Args:
        chunks: All of them; their memory is read for as long as they are left.

    Attributes:
        num_stored: Chunks that are; those that follow are left.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = iter(chunks)
        self._sent: deque[Chunk] = deque()
        self.num_stored = 0

    @property
    def num_sent(self) -> int:
        """Chunks that were sent and whose answer has not been read."""
        return len(self._sent)

    def send_next(self) -> tuple[int, Chunk] | None:
        """Return the next chunk to send and its number; None if there is none."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return None
        self._sent.append(chunk)
        return self.num_stored + len(self._sent) - 1, chunk

    def stored(self) -> None:
        """Note that the first of the chunks that were sent is stored."""
        self._sent.popleft()
        self.num_stored += 1

    def __iter__(self) -> Iterator[Chunk]:
        """Yield what is left, from the first chunk that is not known to be stored."""
        yield from self._sent
        yield from self._chunks


def _write_all(connection: Any, digest: str, left: Unwritten, is_stopped: Callable[[], bool]) -> bool:
    """Return whether all answers were read, so that the connection can be used again."""
    socket = connection._sock  # the library has no sending of memory of the caller's
    while not is_stopped() and (following := left.send_next()) is not None:
        number, chunk = following
        _send(socket, _command(keys.chunk(digest, number), chunk))
        if left.num_sent > _AHEAD and not _is_stored(socket, left):
            return False
    while left.num_sent:
        if not _is_stored(socket, left):
            return False
    return True


def _command(name: str, chunk: Chunk) -> list[memoryview | bytes]:
    parts: list[memoryview | bytes] = list(chunk)
    if len(parts) > _MAX_VIEWS:
        parts = [b"".join(chunk)]
    head = f"*3\r\n$3\r\nSET\r\n${len(name)}\r\n{name}\r\n${sum(map(len, parts))}\r\n"
    return [head.encode(), *parts, b"\r\n"]


def _send(socket: Any, parts: list[memoryview | bytes]) -> None:
    rest = deque(parts)
    while rest:
        num_sent = socket.sendmsg(rest)
        while rest and num_sent >= len(rest[0]):
            num_sent -= len(rest.popleft())
        if num_sent:
            rest[0] = memoryview(rest[0])[num_sent:]


def _is_stored(socket: Any, left: Unwritten) -> bool:
    """Read an answer; return whether it says that the chunk is stored."""
    answer = b""
    while len(answer) < len(_STORED):
        part = socket.recv(len(_STORED) - len(answer))
        if not part:
            raise ConnectionResetError("Valkey has closed the connection")
        answer += part
    if answer != _STORED:
        return False
    left.stored()
    return True
