"""The record of every stream, every refusal and every fault, on one clock."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from support.soak.fleet import Part

LONG_GAP_S: Final = 0.3
# A fault's effects last a moment longer: a backoff under way, a session that is being opened.
AFTERMATH_S: Final = 8.0
MAX_SAID: Final = 40


class Outcome(Enum):
    """How a request ended."""

    OK = "ok"
    CUT = "cut by its client"
    REFUSED = "refused"
    LOST = "lost"
    LOST_WITH_GATEWAY = "lost with its gateway"
    WRONG = "wrong"
    HUNG = "hung"


@dataclass(slots=True)
class Stream:
    """One request as its client saw it; times in monotonic seconds.

    Attributes:
        gateway: The gateway that it went through.
        generation: That gateway's generation when the stream began.
        gaps: Long waits: when each began, and how long it was.
        reason: Reason of the error that ended it.
    """

    face: str
    gateway: Part
    generation: int
    began_s: float
    ended_s: float = 0.0
    heard_s: float = 0.0
    num_tokens: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)
    outcome: Outcome | None = None
    reason: str = ""

    def hear(self) -> None:
        """Note that data has arrived."""
        now = time.monotonic()
        if now - self.heard_s > LONG_GAP_S:
            self.gaps.append((self.heard_s, now - self.heard_s))
        self.heard_s = now

    def end(self, outcome: Outcome, reason: str = "") -> None:
        """Note the end."""
        if outcome is Outcome.OK:
            self.hear()
        self.ended_s, self.outcome, self.reason = time.monotonic(), outcome, reason


@dataclass(slots=True)
class Fault:
    """One fault of the fleet.

    Attributes:
        kind: Kind of fault, e.g. ``kill engine``.
        part: Name of the affected part.
        healed_s: When the fault was over.
        recovered_s: When requests through every gateway were answered again.
        in_flight: Streams under way when the fault began.
    """

    kind: str
    part: str
    began_s: float
    healed_s: float = 0.0
    recovered_s: float = 0.0
    in_flight: int = 0


class Book:
    """The record that clients and director write.

    Attributes:
        counts: Other events, by name.
        errors: Events that must not happen, in words; any of them fails the soak.
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.faults: list[Fault] = []
        self.running: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.num_errors = 0

    def open(self, face: str, gateway: Part) -> Stream:
        """Enter a new stream."""
        now = time.monotonic()
        stream = Stream(face, gateway, gateway.generation, now, heard_s=now)
        self.streams.append(stream)
        self.running.add(id(stream))
        return stream

    def close(self, stream: Stream, outcome: Outcome, reason: str = "") -> None:
        """Enter a stream's end."""
        stream.end(outcome, reason)
        self.running.discard(id(stream))

    def wrong(self, what: str) -> None:
        """Enter an event that must not happen."""
        self.num_errors += 1
        if len(self.errors) < MAX_SAID:
            self.errors.append(what[:600])

    def begin(self, kind: str, part: str) -> Fault:
        """Enter the beginning of a fault."""
        fault = Fault(kind, part, time.monotonic(), in_flight=len(self.running))
        self.faults.append(fault)
        return fault

    def disturbers(self, began_s: float, ended_s: float) -> set[str]:
        """Return the kinds of faults during a stretch of time."""
        return {fault.kind for fault in self._during(began_s - AFTERMATH_S, ended_s)}

    def lost_its_gateway(self, stream: Stream, *, has_others: bool = False) -> bool:
        """Return whether the process that a stream went through ended while the stream ran.

        Args:
            stream: The stream.
            has_others: Its client knows the other gateways too, and may have been with any of them.
        """
        ended = ("kill gateway", "restart gateway")
        faults = self._during(stream.began_s, time.monotonic())
        return any(fault.kind in ended and (has_others or fault.part == stream.gateway.name) for fault in faults)

    def _during(self, began_s: float, ended_s: float) -> list[Fault]:
        return [f for f in self.faults if f.began_s <= ended_s and (not f.recovered_s or f.recovered_s >= began_s)]
