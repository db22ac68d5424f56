"""``python -m loraplex_engine.ranks``: a rank other than 0 of a tensor-parallel group; an engine starts it, nothing else does.

It ends with the engine's process, however that ends: a thread reads the line to it, whose end the kernel tells.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common import log

from loraplex_engine.ranks.plan_ring import ReaderFds, RingReader
from loraplex_engine.ranks.rank_line import MAX_BYTES, RankSetup, Said, Word, say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.ranks.following import Following

BEAT_S: Final = 0.5
EXIT_FAILED: Final = 70


class Life:
    """Says now and then that this process lives, and what it has done; ends it when the engine's has ended.

    Args:
        line: The line to rank 0.

    Attributes:
        following: What has figures; None while the model is loaded.
    """

    def __init__(self, line: socket.socket) -> None:
        self.following: Following | None = None
        self._line = line

    def run(self) -> None:
        """Do so for as long as the process lives."""
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while True:
            try:
                if poll.poll(BEAT_S * 1000) and not self._line.recv(MAX_BYTES):
                    os._exit(0)
                figures = "" if self.following is None else self.following.figures().to_text()
                say(self._line, Said(Word.LIVES, text=figures))
            except OSError:
                os._exit(0)


def arena_part(fd: int, setup: RankSetup, page_bytes: int) -> NDArray[np.uint8]:
    """Return the rank's part of the arena, ``[num_arena_slots, page_bytes]``."""
    num_bytes = setup.num_arena_slots * page_bytes
    begin = os.fstat(fd).st_size - (setup.degree - setup.rank) * num_bytes
    memory = np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8)
    return memory[begin : begin + num_bytes].reshape(setup.num_arena_slots, page_bytes)


def prepare(setup: RankSetup, line: socket.socket, meeting_fd: int) -> Following:
    """Load the rank's part of the model."""
    import torch

    from loraplex_engine.ranks.following import Following, make_follower

    torch.set_num_threads(setup.num_threads)
    return Following(make_follower(setup, meeting_fd), line)


def main() -> None:
    """Follow rank 0 until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the engine drains on them, with all ranks, and then says so
        signal.signal(number, signal.SIG_IGN)
    line_fd, ring_fd, work_fd, room_fd, arena_fd, meeting_fd = map(int, sys.argv[1:])
    line = socket.socket(fileno=line_fd)
    told = line.recv(MAX_BYTES)
    if not told:
        return
    setup = RankSetup.from_bytes(told)
    log.configure(f"engine-rank-{setup.rank}", setup.log_level, setup.log_format)  # type: ignore[arg-type]
    life = Life(line)
    threading.Thread(target=life.run, name="engine-watch", daemon=True).start()
    try:
        following = prepare(setup, line, meeting_fd)
        following.arena = arena_part(arena_fd, setup, following.page_bytes)
        life.following = following
        say(line, Said(Word.READY))
        following.run(RingReader(ring_fd, ReaderFds(work_fd, room_fd)))
    except BaseException as error:
        log.get_logger().exception("a tensor-parallel rank has failed", rank=setup.rank)
        say(line, Said(Word.FAILED, text=f"{type(error).__name__}: {error}"))
        os._exit(EXIT_FAILED)  # copies that wait for a collective would keep the interpreter from its end


if __name__ == "__main__":
    main()
