"""From a profiler's trace of one step to a table: which kernel, how often, how long, and when nothing ran."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_bench.results import Row

if TYPE_CHECKING:
    from pathlib import Path

ON_DEVICE: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
SUITE: Final = "profile"
MAX_NAME: Final = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceEvent:
    """Something that ran on the device; times in microseconds."""

    name: str
    begin_us: float
    duration_us: float
    stream: int

    @property
    def end_us(self) -> float:
        """When it ended."""
        return self.begin_us + self.duration_us


@dataclass(kw_only=True, slots=True)
class KernelLine:
    """All launches of one kernel in a step.

    Attributes:
        busy_us: Their durations together; kernels on parallel branches count fully.
        gap_us: Time before them in which nothing ran on the device.
    """

    name: str
    count: int = 0
    busy_us: float = 0.0
    gap_us: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """A step's kernels, longest first.

    Attributes:
        wall_us: From the first launch's begin to the last one's end.
        idle_us: The part of it in which no kernel ran.
    """

    name: str
    lines: tuple[KernelLine, ...]
    wall_us: float
    idle_us: float

    @property
    def busy_us(self) -> float:
        """All durations together; more than ``wall_us`` where branches overlap."""
        return sum(line.busy_us for line in self.lines)


def read_trace(path: Path) -> list[DeviceEvent]:
    """Return what ran on the device according to a Chrome trace."""
    events = json.loads(path.read_text())["traceEvents"]
    return [
        DeviceEvent(
            name=event["name"],
            begin_us=float(event["ts"]),
            duration_us=float(event.get("dur", 0.0)),
            stream=int(event.get("args", {}).get("stream", -1)),
        )
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE
    ]


def summarise(name: str, events: list[DeviceEvent]) -> StepProfile:
    """Add up a step's events.

    Raises:
        ValueError: If nothing ran on the device.
    """
    if not events:
        raise ValueError(f"{name}: the profiler saw nothing on the device")
    lines: dict[str, KernelLine] = {}
    ordered = sorted(events, key=lambda event: event.begin_us)
    busy_until = ordered[0].begin_us
    idle = 0.0
    for event in ordered:
        line = lines.setdefault(event.name, KernelLine(name=event.name))
        gap = max(0.0, event.begin_us - busy_until)
        line.count += 1
        line.busy_us += event.duration_us
        line.gap_us += gap
        idle += gap
        busy_until = max(busy_until, event.end_us)
    longest_first = tuple(sorted(lines.values(), key=lambda line: -line.busy_us))
    return StepProfile(name=name, lines=longest_first, wall_us=busy_until - ordered[0].begin_us, idle_us=idle)


def short_name(name: str) -> str:
    """Return a kernel's name without the tail of its template arguments."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."


def markdown(profile: StepProfile, *, max_lines: int = 24) -> str:
    """Return the table; what is left out is added up in its last line."""
    shown, rest = profile.lines[:max_lines], profile.lines[max_lines:]
    if rest:
        counts = sum(line.count for line in rest)
        busy, gap = sum(line.busy_us for line in rest), sum(line.gap_us for line in rest)
        shown = (*shown, KernelLine(name=f"{len(rest)} others", count=counts, busy_us=busy, gap_us=gap))
    text = [
        f"### {profile.name}",
        "",
        f"{profile.wall_us / 1e3:.3f} ms; kernels together {profile.busy_us / 1e3:.3f} ms, nothing ran for "
        f"{profile.idle_us / 1e3:.3f} ms.",
        "",
        "| kernel | count | us | us each | share | gap before, us |",
        "|---|---|---|---|---|---|",
    ]
    for line in shown:
        share = line.busy_us / profile.wall_us
        name = short_name(line.name).replace("|", "\\|")
        text.append(
            f"| {name} | {line.count} | {line.busy_us:,.1f} | {line.busy_us / line.count:,.2f} | {share:.1%} | "
            f"{line.gap_us:,.1f} |"
        )
    return "\n".join([*text, ""])


def rows(profile: StepProfile) -> list[Row]:
    """Return the rows of a result file."""
    whole = [
        Row(suite=SUITE, case=profile.name, metric="wall", value=profile.wall_us, unit="us"),
        Row(suite=SUITE, case=profile.name, metric="idle", value=profile.idle_us, unit="us"),
    ]
    for line in profile.lines:
        case = f"{profile.name}/{short_name(line.name)}"
        whole += [
            Row(suite=SUITE, case=case, metric="count", value=line.count, unit="launches"),
            Row(suite=SUITE, case=case, metric="busy", value=line.busy_us, unit="us"),
            Row(suite=SUITE, case=case, metric="share", value=line.busy_us / profile.wall_us, unit="of step"),
            Row(suite=SUITE, case=case, metric="gap", value=line.gap_us, unit="us"),
        ]
    return whole
