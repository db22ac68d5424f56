"""How the bodies of other APIs call the fields that errors of chat completions name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.errors import BodyError, BodyNames

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_gateway.openai.fields import Table
    from loraplex_gateway.openai.schema import CommonBody

_TURN: Final = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\](?:\.function)?)?")
Rename = tuple[re.Pattern[str], str]


def renames(*pairs: tuple[str, str]) -> tuple[Rename, ...]:
    """Return (pattern, replacement) pairs compiled."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation as chat completions have it.

    Attributes:
        turns: Objects of ``messages``.
        paths: Where in the body each turn comes from.
        calls: Where each call of each turn comes from.
    """

    turns: Sequence[dict[str, object]] = ()
    paths: Sequence[str] = ()
    calls: Sequence[Sequence[str]] = ()


class OtherNames(BodyNames):
    """Names of a body that was turned into one of chat completions.

    Args:
        table: The body's own fields.
        body: The body.
        chat: Where in it each turn of the conversation comes from.
        renames: What else is called otherwise.
        constraint: The field of the chat body that constrains the output; empty if none does.
        callable_tools: As of `BodyNames`.
    """

    def __init__(
        self,
        table: Table,
        body: CommonBody | None,
        *,
        chat: Chat | None = None,
        renames: Iterable[Rename] = (),
        constraint: str = "",
        callable_tools: Sequence[int] = (),
    ) -> None:
        super().__init__(table, body, constraint=constraint, callable_tools=callable_tools)
        self._chat = chat or Chat()
        self._renames = tuple(renames)

    def field(self, core: str) -> str:
        """Return the body's name of a field of chat completions, or of the gateway's other parts."""
        return self._called(super().field(self._renamed(core)))

    def text(self, text: str, core: str | None = None) -> str:
        """Return a message in the body's words."""
        if core is not None and text.startswith((f"{core} ", f"{core}:")):
            return self.field(core) + self.text(text.removeprefix(core))
        return super().text(self._renamed(text))

    def refusal(self, error: InvalidParameterError) -> InvalidParameterError:
        """Return the refusal of the body as chat completions, in this body's words."""
        told = [self.violation(field, text) for field, text in error.violations]
        message = "; ".join(text for _, text in told) if told else self.text(error.message)
        if isinstance(error, BodyError):
            return BodyError(message, openai_code=error.openai_code, violations=told)
        return InvalidParameterError(message, violations=told)

    def _renamed(self, text: str) -> str:
        return _TURN.sub(self._path, self._called(text))

    def _called(self, text: str) -> str:
        for pattern, replacement in self._renames:
            text = pattern.sub(replacement, text)
        return text

    def _path(self, match: re.Match[str]) -> str:
        turn = int(match[1])
        if turn >= len(self._chat.paths):
            return match[0]
        return self._chat.paths[turn] if match[2] is None else self._chat.calls[turn][int(match[2])]
