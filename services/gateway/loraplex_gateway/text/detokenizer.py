"""Token ids to text, piece by piece: never half a character, and in sum exactly what decoding all ids at once gives.

An output goes on where its prompt ends, so the prompt's end is part of what is decoded: a decoder may strip the first
word's space, and only the prompt's first word is first. The output's text is decode(prompt + output) without
decode(prompt). Where the prompt ends within a character and the output completes it, the character is the output's.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Final, Protocol

from loraplex_gateway.text.window_detokenizer import REPLACEMENT, WindowDetokenizer, shown_from_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.text.token_table import TokenTable

MAX_OPEN_BYTES: Final = 3  # of an unfinished character in UTF-8


class Detokenizer(Protocol):
    """Incremental decoding of one output."""

    @property
    def num_held(self) -> int:
        """Whole characters that are held."""
        ...

    @property
    def preview(self) -> str:
        """The held text if it is whole characters: what `settle` would return; else nothing."""
        ...

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become certain, maybe none."""
        ...

    def settle(self) -> str:
        """Return held text that is whole characters as if the output ended here; half a character stays."""
        ...

    def flush(self) -> str:
        """Return the rest; the output has ended."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE: a token is bytes, text is their UTF-8 decoding.

    Args:
        table: The model's tokens.
        skip_special_tokens: Whether special tokens have no text.
        prompt_ids: What the output continues; None for an unknown text that ends in a whole character.
        shown_ids: Special tokens that have text all the same.
    """

    num_held = 0
    preview = ""

    def __init__(
        self,
        table: TokenTable,
        *,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int] | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._table = table
        self._skipped = table.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        end = b""
        for token_id in shown_from_end(prompt_ids or (), self._skipped):
            end = table.token_bytes(token_id) + end
            if len(end) >= MAX_OPEN_BYTES:
                break
        self._utf8.decode(end)
        # How many U+FFFD the prompt's text ends with for the character it began.
        self._num_prompts = len(self._utf8.getstate()[0].decode("utf-8", errors="replace"))

    def push(self, token_id: int) -> str:
        """Add a token and return the characters it completed."""
        if token_id in self._skipped:
            return ""
        return self._without_prompts(self._utf8.decode(self._table.token_bytes(token_id)))

    def settle(self) -> str:
        """Return nothing: only half a character is ever held."""
        return ""

    def flush(self) -> str:
        """Return U+FFFD for an unfinished character."""
        return self._without_prompts(self._utf8.decode(b"", final=True))

    def _without_prompts(self, text: str) -> str:
        """Drop the U+FFFD of a character that the prompt began and the output did not complete: they are the prompt's."""
        while text and self._num_prompts:
            self._num_prompts = self._num_prompts - 1 if text[0] == REPLACEMENT else 0
            text = text.removeprefix(REPLACEMENT)
        return text


def make_detokenizer(
    table: TokenTable,
    *,
    skip_special_tokens: bool,
    prompt_ids: Sequence[int] | None = None,
    shown_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """Return the detokenizer that fits the tokenizer's decoder.

    Args:
        table: The model's tokens.
        skip_special_tokens: Whether special tokens have no text.
        prompt_ids: What the output continues; None for an unknown text that ends in a whole character.
        shown_ids: Special tokens that have text all the same.
    """
    kind = ByteLevelDetokenizer if table.is_byte_level else WindowDetokenizer
    return kind(table, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids, shown_ids=shown_ids)
