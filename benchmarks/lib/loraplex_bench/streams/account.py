"""From when tokens were sent and when they came to what a gateway did at each pace."""

from __future__ import annotations

import bisect
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A pace that a gateway keeps up with: all but so few of the tokens that are sent come, and come alone.
KEPT: Final = 0.95


@dataclass(frozen=True, slots=True)
class Window:
    """A while at one pace, from `begin_s` to `end_s` of the monotonic clock.

    Attributes:
        pace: Tokens a second that the engines were told to send, of all streams together.
        cpu_s: What the gateway computed meanwhile, all of its processes.
    """

    pace: float
    begin_s: float
    end_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Rung:
    """What happened in one window; latencies from an engine's write to a client's read, in milliseconds."""

    pace: float
    sent_per_s: float
    tokens_per_s: float
    events_per_s: float
    cpu_us_per_event: float
    p50_ms: float
    p99_ms: float

    @property
    def is_kept(self) -> bool:
        """Whether the gateway kept up, with an event for each token."""
        return self.events_per_s >= KEPT * self.sent_per_s and self.sent_per_s >= KEPT * self.pace


def rung(window: Window, sent: Mapping[str, Sequence[int]], came: Mapping[str, Sequence[Sequence[int]]]) -> Rung:
    """Sum up one window.

    Args:
        window: When.
        sent: Request id -> when each of its tokens was sent, in microseconds.
        came: Request id -> when each of its events came, in microseconds, and of how many tokens it was.
    """
    begin, end = 1e6 * window.begin_s, 1e6 * window.end_s
    wall_s = window.end_s - window.begin_s
    num_sent = num_events = num_tokens = 0
    latencies: list[int] = []
    for request_id, events in came.items():
        times = sent[request_id]
        num_sent += bisect.bisect_left(times, end) - bisect.bisect_left(times, begin)
        position = 0
        for at, count in events:
            if begin <= at < end:
                num_events += 1
                num_tokens += count
                latencies += [at - times[n] for n in range(position, position + count)]
            position += count
    ordered = sorted(latencies) or [0]
    return Rung(
        pace=window.pace,
        sent_per_s=num_sent / wall_s,
        tokens_per_s=num_tokens / wall_s,
        events_per_s=num_events / wall_s,
        cpu_us_per_event=1e6 * window.cpu_s / max(1, num_events),
        p50_ms=ordered[len(ordered) // 2] / 1e3,
        p99_ms=ordered[len(ordered) * 99 // 100] / 1e3,
    )


def summary(rungs: Sequence[Rung]) -> dict[str, Any]:
    """Return the highest rate that was kept up, its cost, and the latency at half of it."""
    kept = [each for each in rungs if each.is_kept] or [rungs[0]]
    best = max(kept, key=lambda each: each.events_per_s)
    half = max((each for each in rungs if each.events_per_s <= 0.55 * best.events_per_s), default=rungs[0], key=_rate)
    return {
        "kept_events_per_s": best.events_per_s,
        "most_events_per_s": max(each.events_per_s for each in rungs),
        "cpu_us_per_event": best.cpu_us_per_event,
        "half_load_events_per_s": half.events_per_s,
        "half_load_p50_ms": half.p50_ms,
        "half_load_p99_ms": half.p99_ms,
        "rungs": [asdict(each) for each in rungs],
    }


def add_latency_added(result: dict[str, Any], direct: Mapping[str, Any]) -> None:
    """Say what of a median latency at half load is the gateway's: what clients see without it at that pace is not."""
    at_half = min(result["rungs"], key=lambda each: abs(each["events_per_s"] - result["half_load_events_per_s"]))
    without = next((each for each in direct["rungs"] if each["pace"] == at_half["pace"]), None)
    if without is not None:
        result["half_load_direct_p50_ms"] = without["p50_ms"]
        result["half_load_added_p50_ms"] = at_half["p50_ms"] - without["p50_ms"]


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median over rounds of each number."""
    common = set.intersection(*(set(run) for run in runs)) - {"rungs"}
    return {key: statistics.median(run[key] for run in runs) for key in runs[0] if key in common}


def _rate(each: Rung) -> float:
    return each.events_per_s
