"""The page of measured figures, from the files in benchmarks/results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_site.repository import ROOT

if TYPE_CHECKING:
    from pathlib import Path

RESULTS: Final = ROOT / "benchmarks" / "results"
PEERS_MACHINE: Final = "NVIDIA H100 80GB HBM3"
"""Where the peers' figures of whole workloads were measured; beside those of another GPU they would say nothing."""
SUITES: Final = {
    "end_to_end": "Whole workloads on one GPU",
    "layers": "What LoRA adds to a decode step",
    "attention": "Attention of decode rows",
    "sampling": "Sampling",
    "store": "The adapter store",
    "names": "100,000 names",
}
"""Suite of a result file's rows -> heading; suites of single kernels are in the files alone."""
HEAD: Final = """# Figures

Written by `make docs` from `benchmarks/results/`: of each case and metric the newest figure, with the machine, the day and the
commit it was measured at. *Floor* is what bytes and operations cost at the rates measured on that machine. Nothing is left out
because it looks bad: all files, the commands that wrote them and what cites them are in the
[index](../repository/benchmarks/results/README.md). How to measure the same: [recipes](../benchmarking.md).
"""
TABLE: Final = """
| case | metric | unit | loraplex | floor | beside it | measured on | day | commit |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One row of a result file, with where it was measured."""

    row: dict[str, Any]
    machine: str
    date: str
    commit: str
    file: str


def newest_figures(folder: Path) -> list[Figure]:
    """Return the newest figure of each suite, case, metric and machine."""
    newest: dict[tuple[str, str, str, str], Figure] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        rows = found.get("rows", []) if isinstance(found, dict) else []
        for row in rows:
            if row.get("suite") not in SUITES:
                continue
            meta = found["meta"]
            machine = "CPU" if meta["gpu"] == "none" else meta["gpu"]
            figure = Figure(row=row, machine=machine, date=meta["date"], commit=meta["commit"][:8], file=path.name)
            key = (row["suite"], row["case"], row["metric"], machine)
            if key not in newest or newest[key].date <= figure.date:
                newest[key] = figure
    return [newest[key] for key in sorted(newest)]


def page(folder: Path = RESULTS) -> str:
    """Return the page of a folder of result files."""
    figures = newest_figures(folder)
    text = HEAD
    for suite, heading in SUITES.items():
        rows = [_row(figure) for figure in figures if figure.row["suite"] == suite]
        if rows:
            text += f"\n## {heading}\n{TABLE}{''.join(rows)}"
    return text


def _row(figure: Figure) -> str:
    row = figure.row
    comparable = row["suite"] != "end_to_end" or figure.machine == PEERS_MACHINE
    peer = f"{_number(row['peer_value'])} {row['peer']}" if comparable and row.get("peer_value") is not None else "-"
    link = f"[{figure.date[:10]}](../repository/benchmarks/results/{figure.file})"
    cells = (
        row["case"],
        row["metric"],
        row["unit"],
        f"**{_number(row['value'])}**",
        _number(row.get("floor")),
        peer,
        figure.machine,
        link,
        f"`{figure.commit}`",
    )
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def _number(value: float | None) -> str:
    """Return a figure with about four digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
