"""Token ids to text, piece by piece: never half a character, and in sum exactly what decoding all ids at once gives."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT: Final = "\ufffd"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """Incremental decoding of one output."""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become certain, maybe none."""
        ...

    def flush(self) -> str:
        """Return the rest; the output has ended."""
        ...


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's map from printable stand-in characters to bytes.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(hidden)})
    return alphabet


_ALPHABET: Final = _byte_level_alphabet()


class TokenTable:
    """What single tokens stand for; shared by all outputs of one model.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self.is_byte_level = decoder.get("type") == "ByteLevel"
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the token is one raw byte of a byte-fallback vocabulary, written ``<0xE4>``."""
        token = self.tokenizer.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def token_text(self, token_id: int) -> str:
        """Return a token's text on its own; bytes that are no UTF-8 become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            # A token with any character outside the alphabet was added as plain text.
            mapped = [_ALPHABET.get(character) for character in token]
            known = [byte for byte in mapped if byte is not None]
            return bytes(known) if len(known) == len(mapped) else token.encode()
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if token_id in self.special_ids:
            return token.encode()
        return token.replace("\u2581", " ").encode()


class ByteLevelDetokenizer:
    """For byte-level BPE: a token is bytes, text is their UTF-8 decoding."""

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool) -> None:
        self._table = table
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add a token and return the characters it completed."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._table.token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decodes a short window of tokens behind the last ones that gave text.

    The window's start supplies context (a decoder may treat the first token differently, e.g. strip its space). A run
    of byte-fallback tokens is held until it ends: the decoder replaces the *whole* run if any byte of it is bad.
    """

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool) -> None:
        self._table = table
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become certain."""
        if token_id in self._skipped:
            return ""
        if self._table.is_byte_token(token_id):
            self._pending.append(token_id)
            return ""
        self._pending.append(token_id)
        return self._commit(hold_incomplete=True)

    def flush(self) -> str:
        """Return the text still held."""
        return self._commit(hold_incomplete=False)

    def _commit(self, *, hold_incomplete: bool) -> str:
        if not self._pending:
            return ""
        decode = self._table.tokenizer.decode
        before = decode(self._context, skip_special_tokens=False) if self._context else ""
        after = decode(self._context + self._pending, skip_special_tokens=False)
        if hold_incomplete and after.endswith(REPLACEMENT):
            return ""
        text = after[len(before) :]
        if text:  # tokens without text stay pending: alone they are no context
            self._context, self._pending = self._pending, []
        return text


def make_detokenizer(table: TokenTable, *, skip_special_tokens: bool) -> Detokenizer:
    """Return the detokenizer that fits the tokenizer's decoder."""
    kind = ByteLevelDetokenizer if table.is_byte_level else WindowDetokenizer
    return kind(table, skip_special_tokens=skip_special_tokens)
