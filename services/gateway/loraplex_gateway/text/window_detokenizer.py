"""Incremental decoding for any decoder: a short window of tokens is decoded, again and again."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loraplex_gateway.text.token_table import TokenTable

REPLACEMENT: Final = "\ufffd"
# Tokens of a prompt's end that are decoded again: more than any decoder looks back.
CONTEXT_TOKENS: Final = 8


def shown_from_end(token_ids: Sequence[int], skipped: frozenset[int]) -> Iterator[int]:
    """Yield the ids that have text, last first."""
    return (token_id for token_id in reversed(token_ids) if token_id not in skipped)


class _ByteRun:
    """Byte-fallback tokens in a row. The decoder takes the row as UTF-8, or replaces *every* byte if any is bad."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self._is_valid = True
        self._num_bytes = 0
        self.text = ""

    def push(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if not self._is_valid:
            return
        try:
            self.text += self._utf8.decode(data)
        except UnicodeDecodeError:
            self._is_valid, self.text = False, ""

    def forget(self) -> None:
        """Count from here on; a character that has begun stays begun, a bad row stays bad."""
        self.text, self._num_bytes = "", 0

    @property
    def num_open(self) -> int:
        """Bytes of an unfinished character at the end."""
        return len(self._utf8.getstate()[0]) if self._is_valid else 0

    @property
    def is_whole(self) -> bool:
        return self._is_valid and self.num_open == 0

    @property
    def num_characters(self) -> int:
        return len(self.text) if self._is_valid else self._num_bytes


class WindowDetokenizer:
    """For any other decoder: decodes a short window of tokens behind the last ones that gave text.

    The window's start supplies context: at first the prompt's end, then the tokens that gave text last. A run of
    byte-fallback tokens is held until it ends.

    Args:
        table: The model's tokens.
        skip_special_tokens: Whether special tokens have no text.
        prompt_ids: What the output continues; None for an unknown text.
        shown_ids: Special tokens that have text all the same.
    """

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
        self._pending: list[int] = []
        if prompt_ids is not None:
            self._context = self._end_of(prompt_ids)
        else:
            self._context = [] if table.anchor is None else [table.anchor]
        self._run = _ByteRun()
        for token_id in self._context[self._num_before_run() :]:
            self._run.push(table.token_bytes(token_id))
        self._run.forget()
        self._num_open = self._run.num_open  # the context's last tokens that are half a character

    @property
    def num_held(self) -> int:
        """Whole characters of the run that is held."""
        return self._run.num_characters

    @property
    def preview(self) -> str:
        """The text of the run that is held, if it is whole characters."""
        return self._run.text if self._run.is_whole else ""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become certain."""
        if token_id in self._skipped:
            return ""
        self._pending.append(token_id)
        if self._table.is_byte_token(token_id):
            self._run.push(self._table.token_bytes(token_id))
            return ""
        return self._commit(hold_incomplete=True)

    def settle(self) -> str:
        """Return the text of the run that is held, if it is whole characters; what comes next begins a new run."""
        return self._commit(hold_incomplete=False) if self.preview else ""

    def flush(self) -> str:
        """Return the text still held."""
        return self._commit(hold_incomplete=False)

    def _commit(self, *, hold_incomplete: bool) -> str:
        if not self._pending:
            return ""
        whole = self._decode(self._context + self._pending)
        if hold_incomplete and whole.endswith(REPLACEMENT):
            return ""
        text = self._behind_context(whole)
        if text:  # tokens without text stay pending: alone they are no context
            self._context, self._pending = self._pending, []
            self._run, self._num_open = _ByteRun(), 0
        return text

    def _behind_context(self, whole: str) -> str:
        before = self._decode(self._context)
        if whole.startswith(before):
            return whole[len(before) :]
        if self._num_open:  # completed: the character was no part of the prompt's text
            before = self._decode(self._context[: -self._num_open])
        if not whole.startswith(before):
            # A bad byte of the output made the decoder replace the context's run too, which stays as it was shown.
            context = self._context[: self._num_before_run()]
            before, whole = self._decode(context), self._decode(context + self._pending)
        return whole[len(before) :]

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt's last tokens: whole runs, and enough that a space at their start is not the text's first."""
        end: list[int] = []
        wanted = CONTEXT_TOKENS
        for token_id in shown_from_end(prompt_ids, self._skipped):
            end.append(token_id)
            if len(end) < wanted or self._table.is_byte_token(token_id):
                continue
            if self._decode(end[::-1]):
                break
            wanted *= 2
        return end[::-1]

    def _num_before_run(self) -> int:
        """Return how many tokens of the context are before the byte tokens at its end."""
        num = len(self._context)
        while num and self._table.is_byte_token(self._context[num - 1]):
            num -= 1
        return num

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._table.tokenizer.decode(token_ids, skip_special_tokens=False)) if token_ids else ""
