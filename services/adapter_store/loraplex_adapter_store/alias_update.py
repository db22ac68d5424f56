"""The messages in which watchers get the table of names: all of it in chunks, and its changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_adapter_store.records import AdapterView, Position

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SNAPSHOT_CHUNK: Final = 50
"""Names per message of a snapshot: 50 names of 100 revisions of about 400 bytes stay well below 4 MiB."""


@dataclass(frozen=True, slots=True)
class AliasUpdate:
    """A part of the table, or a change to it."""

    position: Position
    views: tuple[AdapterView, ...]
    is_snapshot_start: bool = False
    is_snapshot_end: bool = False


def in_chunks(position: Position, views: Sequence[AdapterView]) -> Iterator[AliasUpdate]:
    """Yield the messages of the whole table, at least one; each is made when it is asked for."""
    for start in range(0, len(views) or 1, SNAPSHOT_CHUNK):
        stop = start + SNAPSHOT_CHUNK
        yield AliasUpdate(position, tuple(views[start:stop]), start == 0, stop >= len(views))


def in_parts(before: Position, after: Position, views: Sequence[AdapterView]) -> list[AliasUpdate]:
    """Return the messages of a change; with the last one alone the watcher is where the change leads."""
    parts = [tuple(views[start : start + SNAPSHOT_CHUNK]) for start in range(0, len(views), SNAPSHOT_CHUNK)]
    return [AliasUpdate(after if part is parts[-1] else before, part) for part in parts]
