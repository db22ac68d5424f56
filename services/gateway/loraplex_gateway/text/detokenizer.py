"""Token ids to text, piece by piece: never half a character, and in sum exactly what decoding all ids at once gives.

An output goes on where its prompt ends, so the prompt's end is part of what is decoded: a decoder may strip the first
word's space, and only the prompt's first word is first. The output's text is decode(prompt + output) without
decode(prompt). Where the prompt ends within a character and the output completes it, the character is the output's.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from typing import TYPE_CHECKING, Final, Protocol

from loraplex_gateway.text.window_detokenizer import REPLACEMENT, WindowDetokenizer, shown_from_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

MAX_OPEN_BYTES: Final = 3  # of an unfinished character in UTF-8
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


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

    @functools.cached_property
    def anchor(self) -> int | None:
        """A token whose text is letters or digits: it stands for an unknown text in front of an output."""
        for token_id in range(self.tokenizer.get_vocab_size()):
            if token_id in self.special_ids or self.is_byte_token(token_id):
                continue
            text = self.tokenizer.decode([token_id], skip_special_tokens=False).strip()
            if text.isalnum():
                return token_id
        return None

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
    """For byte-level BPE: a token is bytes, text is their UTF-8 decoding.

    Args:
        table: The model's tokens.
        skip_special_tokens: Whether special tokens have no text.
        prompt_ids: What the output continues; None for an unknown text that ends in a whole character.
    """

    num_held = 0
    preview = ""

    def __init__(
        self, table: TokenTable, *, skip_special_tokens: bool, prompt_ids: Sequence[int] | None = None
    ) -> None:
        self._table = table
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
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
    table: TokenTable, *, skip_special_tokens: bool, prompt_ids: Sequence[int] | None = None
) -> Detokenizer:
    """Return the detokenizer that fits the tokenizer's decoder.

    Args:
        table: The model's tokens.
        skip_special_tokens: Whether special tokens have no text.
        prompt_ids: What the output continues; None for an unknown text that ends in a whole character.
    """
    kind = ByteLevelDetokenizer if table.is_byte_level else WindowDetokenizer
    return kind(table, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids)
