"""Moves adapters in virtual time: the copy stream from the arena to the pool, and the store that fills the arena."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_engine.loop.arena_grants import ArenaGrants
    from loraplex_engine.simulation.adapters import Adapters


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A serial line.

    Attributes:
        bytes_per_s: Its rate.
        latency_s: From the end of a copy until the waiting side knows it; a following copy need not wait for it.
    """

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.latency_s >= 0):
            raise ValueError(f"a link of {self.bytes_per_s} bytes/s and {self.latency_s} s carries nothing")


PINNED_COPY: Final = Link(bytes_per_s=54.6e9, latency_s=20e-6)
"""Pinned host memory to one H100 80GB HBM3, pages of 2 MiB: 54.6 GB/s measured."""
SHARED_MEMORY_STORE: Final = Link(bytes_per_s=1.5e9, latency_s=5e-3)
"""A store on the same host: it writes each page and the engine verifies it with sha256, one image at a time."""


class CopyStream:
    """Loads into the pool, one after the other."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_s = 0.0
        self._loads: deque[tuple[float, str]] = deque()  # (done, digest), in order
        self.busy_s = 0.0

    @property
    def next_s(self) -> float:
        """When the next load is done; infinity if none is under way."""
        return self._loads[0][0] if self._loads else math.inf

    def start(self, digest: str, num_bytes: int, now_s: float) -> None:
        """Queue a load behind the loads under way."""
        span_s = num_bytes / self._link.bytes_per_s
        self._free_s = max(now_s, self._free_s) + span_s
        self.busy_s += span_s
        self._loads.append((self._free_s + self._link.latency_s, digest))

    def take_done(self, now_s: float) -> list[str]:
        """Return and forget the loads that are done."""
        done = []
        while self._loads and self._loads[0][0] <= now_s:
            done.append(self._loads.popleft()[1])
        return done


@dataclass(slots=True)
class _Transfer:
    index: int
    grant: Future[tuple[int, ...] | None]
    done_s: float | None = None


class SimulatedStore:
    """Fills granted arena slots over one link, in the order of the wants.

    A transfer takes the link once its slots are granted; a transfer without its grant lets those behind it pass.
    """

    def __init__(self, *, adapters: Adapters, grants: ArenaGrants, link: Link, page_bytes: int) -> None:
        self._adapters = adapters
        self._grants = grants
        self._link = link
        self._page_bytes = page_bytes
        self._free_s = 0.0
        self._asked: list[_Transfer] = []
        self._sending: deque[_Transfer] = deque()
        self._pending: set[int] = set()  # a want is repeated when a more urgent request waits
        self.num_sent = 0

    @property
    def next_s(self) -> float:
        """When the next image is in the arena; infinity if none is on its way."""
        done_s = self._sending[0].done_s if self._sending else None
        return math.inf if done_s is None else done_s

    def want(self, index: int) -> None:
        """Ask for room for an image, unless it is on its way."""
        if index in self._pending:
            return
        self._pending.add(index)
        transfer = _Transfer(index, Future())
        self._asked.append(transfer)
        self._grants.ask(
            self._adapters.digests[index],
            int(self._adapters.num_pages[index]),
            is_wanted=True,
            future=transfer.grant,
        )

    def begin_granted(self, now_s: float) -> None:
        """Start to send the images whose slots are granted."""
        if not self._asked:
            return
        waiting = []
        for transfer in self._asked:
            if not transfer.grant.done():
                waiting.append(transfer)
            elif transfer.grant.result() is None:
                self._pending.discard(transfer.index)
            else:
                span_s = int(self._adapters.num_pages[transfer.index]) * self._page_bytes / self._link.bytes_per_s
                self._free_s = max(now_s, self._free_s) + span_s
                transfer.done_s = self._free_s + self._link.latency_s
                self._sending.append(transfer)
        self._asked = waiting

    def take_arrived(self, now_s: float) -> list[tuple[int, tuple[int, ...]]]:
        """Return and forget the images that have arrived in the arena: (adapter, slots)."""
        arrived = []
        while self._sending and self.next_s <= now_s:
            transfer = self._sending.popleft()
            slots = transfer.grant.result()
            assert slots is not None, "only granted transfers are sent"
            arrived.append((transfer.index, slots))
            self._pending.discard(transfer.index)
            self.num_sent += 1
        return arrived
