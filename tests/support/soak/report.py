"""The result of a soak: figures for each fault, and the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from support.soak.book import Outcome

if TYPE_CHECKING:
    from support.soak.book import Book, Fault, Stream
    from support.soak.memory import Slope


@dataclass
class Report:
    """A soak's result; see `verdict` for what must hold.

    Attributes:
        outcomes: Outcome -> number of requests.
        refusals: Reason -> number of refused requests.
        clients_resume: Whether clients over gRPC resume streams; clients over HTTP cannot.
        faults: Kind -> how often, streams in flight, lost, longest gap and recovery.
        processes: Growth of every process that lived long enough.
        errors: Events that must not happen but did, the first of them in words.
    """

    seed: int
    commit: str
    minutes: float
    num_requests: int = 0
    num_tokens: int = 0
    clients_resume: bool = False
    outcomes: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    longest_lag_s: float = 0.0
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: list[dict[str, Any]] = field(default_factory=list)
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether every requirement held."""
        return not self.verdict()

    def verdict(self) -> list[str]:
        """Return the requirements that did not hold."""
        found = [f"{self.outcomes[kind]} {kind}" for kind in ("wrong", "lost", "hung") if self.outcomes.get(kind)]
        if self.num_errors:
            found.append(f"{self.num_errors} errors")
        found += [f"{process['name']} grows: {process}" for process in self.processes if not process["is_flat"]]
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the report's content for its file."""
        return {"is_good": self.is_good, "verdict": self.verdict(), **asdict(self)}


def fill(report: Report, book: Book, slopes: list[Slope]) -> Report:
    """Fill in a report from the record."""
    ended = [stream for stream in book.streams if stream.outcome is not None]
    report.num_requests = len(ended)
    report.num_tokens = sum(stream.num_tokens for stream in ended)
    report.outcomes = dict(Counter(stream.outcome.value for stream in ended if stream.outcome is not None))
    report.refusals = dict(Counter(stream.reason for stream in ended if stream.outcome is Outcome.REFUSED))
    report.counts = dict(sorted(book.counts.items()))
    report.processes = [asdict(slope) | {"is_flat": slope.is_flat} for slope in slopes]
    report.num_errors, report.errors = book.num_errors, book.errors
    for kind in sorted({fault.kind for fault in book.faults}):
        report.faults[kind] = _figures([fault for fault in book.faults if fault.kind == kind], ended)
    return report


def _figures(faults: list[Fault], streams: list[Stream]) -> dict[str, Any]:
    seen = [(fault, _alive_during(fault, streams)) for fault in faults]
    ends = Counter(stream.outcome for _, alive in seen for stream in alive)
    gaps = [_longest_gap(fault, alive) for fault, alive in seen]
    recoveries = [fault.recovered_s - fault.began_s for fault in faults if fault.recovered_s]
    return {
        "times": len(faults),
        "streams_in_flight": sum(fault.in_flight for fault in faults),
        "lost": ends[Outcome.LOST] + ends[Outcome.HUNG] + ends[Outcome.WRONG],
        "lost_with_gateway": ends[Outcome.LOST_WITH_GATEWAY],
        "refused": ends[Outcome.REFUSED],
        "longest_gap_s": round(max(gaps, default=0.0), 2),
        "recovery_s": {"median": round(median(recoveries), 2), "max": round(max(recoveries), 2)} if recoveries else {},
    }


def _alive_during(fault: Fault, streams: list[Stream]) -> list[Stream]:
    end_s = fault.recovered_s or float("inf")
    return [stream for stream in streams if stream.began_s <= end_s and stream.ended_s >= fault.began_s]


def _longest_gap(fault: Fault, alive: list[Stream]) -> float:
    end_s = fault.recovered_s or float("inf")
    waits = [
        length_s
        for stream in alive
        for began_s, length_s in stream.gaps
        if began_s <= end_s and began_s + length_s >= fault.began_s
    ]
    return max(waits, default=0.0)
