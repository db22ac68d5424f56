"""What readers of calls share: the text of one region, from what opens it to its end."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from loraplex_gateway.chat_output.deltas import ArgumentsDelta, Delta, ToolCallStart

# What other servers' models are asked to call, dots included; the names that requests may offer have none.
NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_LETTERS: Final = string.ascii_letters + string.digits


@dataclass(kw_only=True)
class Calls:
    """The calls of one output, counted.

    Attributes:
        schemas: The offered functions' parameters, by name.
        id_length: Characters of an id; 0 for OpenAI's form.
        num: Calls so far.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    id_length: int = 0
    num: int = 0

    def start(self, name: str) -> ToolCallStart:
        """Return the start of the next call."""
        index, self.num = self.num, self.num + 1
        drawn = "".join(secrets.choice(_LETTERS) for _ in range(self.id_length or 24))
        return ToolCallStart(index, drawn if self.id_length else f"call_{drawn}", name)

    def arguments(self, text: str) -> ArgumentsDelta:
        """Return more arguments of the call that began last."""
        return ArgumentsDelta(self.num - 1, text)


@dataclass(slots=True)
class Step:
    """What a reader made of its text.

    Attributes:
        rest: What is behind the region once it has ended; None while it goes on.
        malformed: What opened it, if it is no call after all: content, in front of `rest`.
    """

    deltas: list[Delta] = field(default_factory=list)
    rest: str | None = None
    malformed: str = ""


class RegionReader(Protocol):
    """Reads one region, fed piece by piece from behind what opens it."""

    def push(self, text: str) -> Step:
        """Take more text."""
        ...

    def finish(self) -> Step:
        """The output has ended within the region."""
        ...


def could_begin(text: str, whole: str) -> bool:
    """Return whether a text is the beginning of another, all of it included."""
    return text.startswith(whole) or whole.startswith(text)


def held_from(text: str, wanted: tuple[str, ...]) -> int:
    """Return from where on a text may be the beginning of one of the wanted ones; its length for nowhere."""
    longest = max((len(item) for item in wanted), default=1) - 1
    for at in range(max(0, len(text) - longest), len(text)):
        if any(item.startswith(text[at:]) for item in wanted):
            return at
    return len(text)


def first_of(text: str, wanted: tuple[str, ...]) -> tuple[int, str] | None:
    """Return where the first of the wanted texts is, and which; at one place the longest."""
    found = [(at, -len(item), item) for item in wanted if (at := text.find(item)) >= 0]
    return min(found)[::2] if found else None
