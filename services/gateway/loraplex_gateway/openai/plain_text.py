"""The parser of an output that is text and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_gateway.chat_output.deltas import ContentDelta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.chat_output.deltas import Delta


class PlainText:
    """Takes all text as what the assistant says."""

    def push(self, text: str) -> Sequence[Delta]:
        """Return the text."""
        return (ContentDelta(text),) if text else ()

    def finish(self) -> Sequence[Delta]:
        """Return nothing: no text is held back."""
        return ()
