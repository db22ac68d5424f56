"""Figures with a bound each: what ``benchmarks/policies.py`` prints, and whether all hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path  # a field's type
from typing import Final

from loraplex_bench.results import Row, text_of

SUITE: Final = "policies"
LINE: Final = "{mark:<5} {section:<10} {case:<58} {value:>11} {unit:<7} {bound:>12} {peer_value:>11} {peer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        section: What it belongs to: ``overload``, ``fairness`` and so on.
        value: NaN if it was not measured.
        at_least: It must not be below this; ``at_most`` not above. Neither: it is printed for comparison.
        peer: What reaches ``peer_value`` on the same work: a baseline policy, or a published figure.
    """

    section: str
    case: str
    metric: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    peer: str = ""
    peer_value: float | None = None

    @property
    def is_bound(self) -> bool:
        """True if the figure must hold."""
        return self.at_least is not None or self.at_most is not None

    @property
    def is_measured(self) -> bool:
        """False if there is nothing to compute it from."""
        return not math.isnan(self.value)

    @property
    def holds(self) -> bool:
        """Whether it is within its bounds; what was not measured is not."""
        if not self.is_bound:
            return True
        return (
            self.is_measured
            and (self.at_least is None or self.value >= self.at_least)
            and (self.at_most is None or self.value <= self.at_most)
        )

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f">= {text_of(self.at_least)}"
        return f"<= {text_of(self.at_most)}" if self.at_most is not None else ""

    @property
    def row(self) -> Row:
        """The figure as a row of a result file."""
        return Row(
            suite=SUITE,
            case=f"{self.section}/{self.case}",
            metric=self.metric,
            value=self.value,
            unit=self.unit,
            floor=self.at_least if self.at_least is not None else self.at_most,
            peer=self.peer,
            peer_value=self.peer_value,
        )


@dataclass(kw_only=True)
class Report:
    """Figures of one run, printed as they come.

    Attributes:
        images: Folder of the plots.
        replay_requests: Length of the long replay; None for the million that the figure is about.
        is_quick: Shorter traces: for a look, not for the record.
    """

    images: Path
    replay_requests: int | None = None
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print_head(self) -> None:
        """Print the names of the columns."""
        names = {name: name for name in ("section", "case", "value", "unit", "bound", "peer")}
        print(LINE.format(mark="", peer_value="peer's", **names), flush=True)

    def add(self, figure: Figure) -> None:
        """Take a figure and print it."""
        self.figures.append(figure)
        mark = ("ok" if figure.holds else "FAILS") if figure.is_bound else ""
        print(
            LINE.format(
                mark=mark,
                section=figure.section,
                case=f"{figure.case} {figure.metric}",
                value=text_of(figure.value) if figure.is_measured else "not measured",
                unit=figure.unit,
                bound=figure.bound,
                peer_value="" if figure.peer_value is None else text_of(figure.peer_value),
                peer=figure.peer,
            ).rstrip(),
            flush=True,
        )

    def note(self, text: str) -> None:
        """Keep a remark for the file's reader, and print it."""
        self.notes.append(text)
        print(f"  # {text}", flush=True)

    def plot(self, name: str, svg: str) -> None:
        """Write a plot."""
        self.images.mkdir(parents=True, exist_ok=True)
        (self.images / name).write_text(svg)
        self.note(f"plotted {name}")  # where is the command line's affair, and result files hold no paths of a machine

    @property
    def summary(self) -> str:
        """One line on all figures with a bound."""
        bound = [figure for figure in self.figures if figure.is_bound]
        failed = [f"{figure.section}/{figure.case} {figure.metric}" for figure in bound if not figure.holds]
        unmeasured = sum(not figure.is_measured for figure in bound)
        if not failed:
            return f"all {len(bound)} figures hold"
        return (
            f"{len(bound) - len(failed)} of {len(bound)} figures hold, {unmeasured} of the others were not measured; "
            f"not held: {', '.join(failed)}"
        )

    @property
    def holds(self) -> bool:
        """True if every figure with a bound holds; a run without any shows nothing."""
        return any(figure.is_bound for figure in self.figures) and all(figure.holds for figure in self.figures)
