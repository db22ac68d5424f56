"""Tables and sections that fit a terminal: what does not fit is left out as a whole, or ends with an ellipsis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP: Final = 2
"""Cells beside a column's text: rich pads each side by one."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        header: Its header.
        cells: Its texts, from the first row to the last.
        rank: Columns of a high rank are left out before those of a low one; 0 is never left out.
        least: Cells of a terminal to which its texts may be cut; None if they may not.
    """

    header: str
    cells: Sequence[Text]
    rank: int = 0
    least: int | None = None

    @property
    def whole(self) -> int:
        """Cells of a terminal that it takes uncut, without gaps."""
        return max(cell_len(self.header), *(cell.cell_len for cell in self.cells), 0)

    @property
    def needed(self) -> int:
        """Cells that it takes when it is cut."""
        return self.whole if self.least is None else min(self.whole, max(self.least, cell_len(self.header)))


def fitted_table(columns: Sequence[Column], width: int | None) -> Table:
    """Return a table of one line per row, and one for the headers.

    Args:
        columns: From left to right, all of the same length.
        width: Cells that there are: columns are cut, and left out by rank, until the rest fits. None for no limit.
    """
    kept = list(columns)
    while width is not None and (last := max(kept, key=lambda column: column.rank)).rank:
        if sum(column.needed + GAP for column in kept) <= width:
            break
        kept.remove(last)
    spare = None if width is None else max(0, width - sum(column.needed + GAP for column in kept))
    shown, texts = Table(box=None), []
    for column in kept:
        given = column.whole if spare is None else min(column.whole, column.needed + spare)
        spare = None if spare is None else spare - (given - column.needed)
        shown.add_column(Text(column.header), no_wrap=True, overflow="ellipsis")
        texts.append([_cut(cell, given) for cell in column.cells])
    for row in zip(*texts, strict=True):
        shown.add_row(*row)
    return shown


def share_lines(wanted: Sequence[int], room: int) -> list[int]:
    """Return how many lines each of several sections gets, at most what it wants.

    Sections that want less than an equal share leave the rest to the others; lines that do not divide go to the section
    that wants most.
    """
    shares, left = [0] * len(wanted), max(0, room)
    waiting = sorted(range(len(wanted)), key=lambda section: (wanted[section], -section))
    for number, section in enumerate(waiting):
        shares[section] = min(wanted[section], left // (len(waiting) - number))
        left -= shares[section]
    return shares


def _cut(cell: Text, width: int) -> Text:
    cut = cell.copy()
    cut.truncate(width, overflow="ellipsis")
    return cut
