"""Where labels have pointed: written by the change that moves them, newest first, bounded by name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from loraplex_adapter_store.records import AdapterRecord

MOVES_KEPT: Final = 200
"""Moves kept of one name, all labels together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AliasMove:
    """One move of a label.

    Attributes:
        left: The revision that it left; empty if there was no such label.
        revision: The one that it points at since; empty if it was removed.
        cause: The call that moved it, e.g. ``push``.
        time: Unix seconds.
        shares: Revision -> weight, if the label was split.
    """

    label: str
    left: str
    revision: str
    cause: str
    time: float
    shares: dict[str, int] = field(default_factory=dict)

    @property
    def reversed(self) -> AliasMove:
        """The move that this one took back."""
        return dataclasses.replace(self, left=self.revision, revision=self.left)

    def to_json(self) -> str:
        """Encode for Valkey."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: str | bytes) -> AliasMove:
        """Decode what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(data)
        return cls(**fields)


def moves_between(old: AdapterRecord, new: AdapterRecord, cause: str) -> list[AliasMove]:
    """Return the moves that make one state of a record of another, by label."""
    return [
        AliasMove(
            label=label,
            left=old.labels.get(label, ""),
            revision=new.labels.get(label, ""),
            cause=cause,
            time=new.update_time,
            shares=new.splits.get(label, {}),
        )
        for label in sorted({*old.labels, *new.labels})
        if old.shares_of(label) != new.shares_of(label)
    ]


class AliasMoves:
    """Reads the moves of names."""

    def __init__(self, client: keys.Client) -> None:
        self._client = client

    async def of(self, name: str, label: str = "") -> list[AliasMove]:
        """Return the moves of a name's labels, or of one of them, newest first."""
        with keys.translated():
            found = await self._client.lrange(keys.moves(name), 0, -1)
        moves = [AliasMove.from_json(data) for data in found]
        return [move for move in moves if label in ("", move.label)]
