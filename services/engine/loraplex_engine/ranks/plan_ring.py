"""A ring of records in shared memory: rank 0 writes what the other ranks of its host do, in order, and each of them reads all.

A record that one slot has no room for takes several, one behind another. Bytes of the memory file, with S = `SLOT_BYTES`; all
numbers are little-endian:

    [i * S, i * S + 24)         u64 number of the slot since the start, u32 kind of the record, u32 bytes of it in this slot, u32
                                bytes of it in later ones, u32 unused
    [i * S + 24, (i + 1) * S)   the bytes, for slot i in [0, `NUM_SLOTS`)

Two semaphores for each reader (eventfds) count what it may read, and what it has read: neither end spins, and no number is read
that the other end writes.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUM_SLOTS: Final = 8
SLOT_BYTES: Final = 256 * 1024
_SLOT: Final = struct.Struct("<QIII4x")
ROOM_BYTES: Final = SLOT_BYTES - _SLOT.size
"""Bytes of a record that one slot has room for."""
RING_BYTES: Final = NUM_SLOTS * SLOT_BYTES


class GroupLostError(RuntimeError):
    """A process of the group is gone, or does not get on; nothing that needs all ranks can go on."""


class Record(NamedTuple):
    """One record.

    Attributes:
        kind: What it says; see `rank_records`.
        payload: Its bytes.
    """

    kind: int
    payload: bytes


class ReaderFds(NamedTuple):
    """Descriptors of one reader.

    Attributes:
        work: Counts the slots that it has to read.
        room: Counts the slots that it does not need.
    """

    work: int
    room: int


class RingWriter:
    """Rank 0's end.

    Args:
        num_readers: Other ranks.

    Attributes:
        fd: The memory file, for the readers.
        readers: Descriptors of each reader.
    """

    def __init__(self, num_readers: int) -> None:
        self.fd = os.memfd_create("loraplex-plans", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, RING_BYTES)
        self._map = mmap.mmap(self.fd, RING_BYTES)
        counts = os.EFD_CLOEXEC | os.EFD_SEMAPHORE
        self.readers = tuple(
            ReaderFds(os.eventfd(0, counts), os.eventfd(NUM_SLOTS, counts | os.EFD_NONBLOCK))
            for _ in range(num_readers)
        )
        self._written = 0
        self._is_closed = False

    def write(self, kind: int, pieces: Sequence[bytes], *, timeout_s: float) -> None:
        """Append a record; blocks while the ring is full.

        Args:
            kind: Kind of the record.
            pieces: Its bytes, one piece behind another.
            timeout_s: How long a full ring is waited for.

        Raises:
            GroupLostError: If a reader does not read for so long, or the ring was closed.
        """
        if self._is_closed:
            raise GroupLostError("the ranks' ring is closed")
        rest = memoryview(b"".join(pieces))
        while True:
            part, rest = rest[:ROOM_BYTES], rest[ROOM_BYTES:]
            for rank, reader in enumerate(self.readers, 1):
                _take_room(reader.room, rank, timeout_s)
            at = self._written % NUM_SLOTS * SLOT_BYTES
            _SLOT.pack_into(self._map, at, self._written, kind, len(part), len(rest))
            self._map[at + _SLOT.size : at + _SLOT.size + len(part)] = part
            self._written += 1
            for reader in self.readers:
                os.eventfd_write(reader.work, 1)
            if not rest:
                return

    def close(self) -> None:
        """Free the memory; readers keep theirs."""
        if self._is_closed:
            return
        self._is_closed = True
        self._map.close()
        for fd in (self.fd, *(fd for reader in self.readers for fd in reader)):
            os.close(fd)


class RingReader:
    """Another rank's end.

    Args:
        fd: The memory file.
        fds: Its descriptors.
    """

    def __init__(self, fd: int, fds: ReaderFds) -> None:
        self._map = mmap.mmap(fd, RING_BYTES)
        self._fds = fds
        self._read = 0

    def records(self) -> Iterator[Record]:
        """Yield the records in order; blocks while there is none, and never ends by itself."""
        while True:
            kind, rest, piece = self._next_slot()
            pieces = [piece]
            while rest:
                kind, rest, piece = self._next_slot()
                pieces.append(piece)
            yield Record(kind, b"".join(pieces))

    def _next_slot(self) -> tuple[int, int, bytes]:
        os.eventfd_read(self._fds.work)
        at = self._read % NUM_SLOTS * SLOT_BYTES
        number, kind, length, rest = _SLOT.unpack_from(self._map, at)
        if number != self._read:
            raise GroupLostError(f"slot {self._read} of the ranks' ring has number {number}")
        piece = self._map[at + _SLOT.size : at + _SLOT.size + length]
        self._read += 1
        os.eventfd_write(self._fds.room, 1)
        return kind, rest, piece


def _take_room(fd: int, rank: int, timeout_s: float) -> None:
    while True:
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                raise GroupLostError(f"rank {rank} has read nothing for {timeout_s:.3g} s") from None
        else:
            return
