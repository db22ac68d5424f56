"""The processes of a group's other ranks, as rank 0 has them: started, told what to do, watched, ended.

A thread reads what they say. It notices at once that one has ended, as its socket does, and after `SILENCE_S` that one hangs.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from loraplex_common.log import get_logger

from loraplex_engine.ranks.figures import RankFigures
from loraplex_engine.ranks.plan_ring import GroupLostError, RingWriter
from loraplex_engine.ranks.rank_line import MAX_BYTES, Said, Word

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loraplex_engine.ranks.figures import RankBook
    from loraplex_engine.ranks.rank_line import RankSetup
    from loraplex_engine.ranks.rank_records import Kind

LOOK_S: Final = 0.25
SILENCE_S: Final = 10.0
"""A rank that has said nothing for this long, while this process ran, hangs."""
ROOM_S: Final = 10.0
"""How long a step waits for room in the ring."""
NOTICE_S: Final = 1.0
"""How long after a failed step a rank may be found gone."""
END_S: Final = 2.0
"""How long a rank may take for its end in order."""
_log = get_logger()


class SharedFiles(NamedTuple):
    """Descriptors of memory files that all ranks share. Nothing of them is on a disk, so nothing of a killed engine stays.

    Attributes:
        arena: The host arena.
        meeting: Where the ranks meet for their collectives.
    """

    arena: int
    meeting: int


class RankProcesses:
    """All ranks but rank 0.

    Args:
        setups: What each is, rank 1 first.
        book: Takes their figures.
        files: The memory files that all ranks share: of the host arena, and the one through which they meet.
        on_lost: Called once, on a thread of its own, with what happened when a rank ends or hangs.
        on_load: Called on that thread with each rank's answer to a load.
    """

    def __init__(
        self,
        setups: Sequence[RankSetup],
        book: RankBook,
        *,
        files: SharedFiles,
        on_lost: Callable[[str], None],
        on_load: Callable[[Said], None],
    ) -> None:
        self._book, self._on_lost, self._on_load = book, on_lost, on_load
        self._ring = RingWriter(len(setups))
        self._lines: dict[int, tuple[int, socket.socket]] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._trouble: str | None = None
        self._is_ending = False
        self._lost = threading.Event()
        try:
            for setup, reader in zip(setups, self._ring.readers, strict=True):
                self._start(setup, (self._ring.fd, reader.work, reader.room, *files))
        except BaseException:
            self.close()
            raise
        self._watch = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._watch.start()

    @property
    def pids(self) -> dict[int, int]:
        """Rank -> process id."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def wait_ready(self) -> None:
        """Return once every rank has loaded its part of the model.

        Raises:
            GroupLostError: If one ends before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._trouble or len(self._ready) == len(self._processes))
        self._check()

    def tell(self, kind: Kind, pieces: Sequence[bytes]) -> None:
        """Have all ranks do something, behind what they were told before.

        Raises:
            GroupLostError: If one is gone or does not get on.
        """
        self._check()
        self._ring.write(kind, pieces, timeout_s=ROOM_S)

    def check_after(self, error: Exception) -> None:
        """Raise if a step failed because a rank is gone; what watches it may notice a moment later than the step's collective.

        Raises:
            GroupLostError: If so.
        """
        if self._lost.wait(NOTICE_S):
            raise GroupLostError(self._trouble) from error

    def close(self) -> None:
        """End all ranks and wait for them; those that take too long are killed."""
        with self._changed:
            self._is_ending = True
        for _, line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_WR)  # a rank that reads this ends
        until_s = time.monotonic() + END_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._ring.close()

    def _start(self, setup: RankSetup, fds: tuple[int, ...]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "loraplex_engine.ranks", *map(str, (theirs.fileno(), *fds))]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), *fds))
        self._processes[setup.rank] = process
        self._lines[ours.fileno()] = setup.rank, ours
        ours.send(setup.to_bytes())

    def _check(self) -> None:
        if self._trouble is not None:
            raise GroupLostError(self._trouble)

    def _run(self) -> None:
        try:
            self._watch_all()
        except Exception as error:  # without this thread, a rank's end would be a hang
            self._lose(f"what watches them has failed: {type(error).__name__}: {error}")

    def _watch_all(self) -> None:
        poll, silent_s, looked_s = select.poll(), dict.fromkeys(self._processes, 0.0), time.monotonic()
        for fd in self._lines:
            poll.register(fd, select.POLLIN)
        while not self._is_ending:
            found = poll.poll(LOOK_S * 1000)
            now_s = time.monotonic()
            passed_s, looked_s = min(now_s - looked_s, 2 * LOOK_S), now_s
            for rank in silent_s:
                silent_s[rank] += passed_s if rank in self._ready else 0.0
            for fd, _ in found:
                rank, line = self._lines[fd]
                silent_s[rank] = 0.0
                if not self._hear(rank, line):
                    self._lose(f"rank {rank} {self._reasons.get(rank) or 'has ended'}")
                    return
            for rank, silence_s in silent_s.items():
                if silence_s >= SILENCE_S:
                    self._lose(f"rank {rank} has not got on for {silence_s:.0f} s")
                    return

    def _hear(self, rank: int, line: socket.socket) -> bool:
        """Act on one message of a rank; False if it has ended."""
        try:
            data = line.recv(MAX_BYTES)
        except OSError:
            data = b""
        if not data:
            return False
        said = Said.from_bytes(data)
        if said.word is Word.READY:
            with self._changed:
                self._ready.add(rank)
                self._changed.notify_all()
        elif said.word is Word.LIVES and said.text:
            self._book.others[rank] = RankFigures.from_text(said.text)
        elif said.word in (Word.LOADED, Word.LOAD_FAILED):
            self._on_load(said)
        elif said.word is Word.FAILED:
            self._reasons[rank] = f"has failed: {said.text}"
        return True

    def _lose(self, trouble: str) -> None:
        with self._changed:
            if self._is_ending:
                return
            self._trouble = trouble
            self._changed.notify_all()
        _log.critical("a tensor-parallel rank is gone", trouble=trouble)
        self._on_lost(trouble)
        self._lost.set()
