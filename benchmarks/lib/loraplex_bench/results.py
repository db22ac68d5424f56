"""Rows of a result file, printed as they come and written once, in a file that is never overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from loraplex_bench.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

LINE = "{case:<62} {metric:<18} {value:>12} {unit:<6} {floor:>12} {peer_value:>12} {ratio:>7}  {peer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure.

    Attributes:
        suite: Name of the baseline file it belongs to.
        case: What was run, its parts joined by ``/``.
        metric: What was measured; lower is better unless ``unit`` ends in ``/s`` or is ``share``.
        floor: What the hardware allows at best, in the same unit.
        peer: Name of the system that reaches ``peer_value`` on the same work.
    """

    suite: str
    case: str
    metric: str
    value: float
    unit: str
    floor: float | None = None
    peer: str = ""
    peer_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer, above 1 where ours is better."""
        if not self.peer_value or not self.value:
            return None
        higher_is_better = self.unit.endswith("/s") or self.unit == "share"
        return self.value / self.peer_value if higher_is_better else self.peer_value / self.value


def text_of(value: float | None) -> str:
    """Return a number as a table shows it."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Results:
    """Collects the rows of one run and prints each when it is added."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def print_head(self) -> None:
        """Print the names of the columns."""
        head = {name: name for name in ("case", "metric", "unit", "floor", "peer")}
        print(LINE.format(**head, value="ours", peer_value="peer's", ratio="x peer"), flush=True)

    def add(self, row: Row) -> None:
        """Take a row and print it."""
        self.rows.append(row)
        print(
            LINE.format(
                case=row.case,
                metric=row.metric,
                value=text_of(row.value),
                unit=row.unit,
                floor=text_of(row.floor),
                peer_value=text_of(row.peer_value),
                ratio=f"{row.ratio:.2f}" if row.ratio else "-",
                peer=row.peer,
            ),
            flush=True,
        )

    def note(self, text: str) -> None:
        """Keep a remark for the file's reader, and print it."""
        self.notes.append(text)
        print(f"  # {text}", flush=True)

    def write(self, out: Path, stem: str, *, commit: str) -> Path:
        """Write one new file and return its path."""
        meta = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "torch": torch.__version__,
            "command": " ".join(sys.argv),
            "notes": self.notes,
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        with path.open("x") as file:  # a second run within the second is an error, not a loss
            json.dump({"meta": meta, "rows": [asdict(row) for row in self.rows]}, file, indent=1)
            file.write("\n")
        print(f"wrote {path}", flush=True)
        return path


def head_commit() -> str:
    """Return the commit that is measured, or ``unknown`` where there is no repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
