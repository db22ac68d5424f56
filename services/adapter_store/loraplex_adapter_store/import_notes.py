"""What an import did and found, kept with the revision that it stored, so that reports can say it later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

MAX_NOTES_BYTES: Final = 16 * 1024
"""Bytes of a revision's notes as JSON."""
MAX_NOTE_CHARS: Final = 1024
"""Characters of one note; a longer one ends in dots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportNotes:
    """The notes of one import.

    Attributes:
        method: ``peft_type``, for example ``LORA``.
        rules: The rules of dialects by which the file was read; empty for PEFT's own form.
        folded: What was folded into other values.
        warnings: The import's other warnings.
        num_omitted: Notes left out for their size.
        signer: Name of the signer of the files; empty if no trusted signature was found or looked for.
    """

    method: str
    rules: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    num_omitted: int = 0
    signer: str = ""

    def to_json(self) -> str:
        """Encode for Valkey in at most `MAX_NOTES_BYTES`; what does not fit is counted in ``num_omitted``."""
        cut: dict[str, Any] = {name: tuple(map(_cut, getattr(self, name))) for name in _LISTS}
        notes = replace(self, signer=_cut(self.signer), **cut)
        while len(data := json.dumps(asdict(notes), separators=(",", ":"))) > MAX_NOTES_BYTES:
            longest = max(_LISTS, key=lambda name: sum(map(len, getattr(notes, name))))
            fewer: dict[str, Any] = {longest: getattr(notes, longest)[:-1]}
            notes = replace(notes, **fewer, num_omitted=notes.num_omitted + 1)
        return data

    @classmethod
    def from_json(cls, data: str | bytes) -> ImportNotes:
        """Decode what `to_json` wrote; fields of a later version are left out."""
        fields: dict[str, Any] = json.loads(data)
        lists = {name: tuple(fields.get(name, ())) for name in _LISTS}
        return cls(
            method=fields["method"], num_omitted=fields.get("num_omitted", 0), signer=fields.get("signer", ""), **lists
        )


_LISTS: Final = ("rules", "folded", "warnings")


def _cut(note: str) -> str:
    return note if len(note) <= MAX_NOTE_CHARS else note[: MAX_NOTE_CHARS - 3] + "..."
