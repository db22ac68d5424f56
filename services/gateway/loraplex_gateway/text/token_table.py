"""What single tokens of a model stand for: bytes, and text on its own."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Final

from loraplex_common.extended_tokenizer import extended_tokenizer, gap_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.added_tokens import AddedToken
    from tokenizers import Tokenizer

_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


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

    def extended(self, added: Sequence[AddedToken]) -> TokenTable:
        """Return the table of the tokenizer with an adapter's tokens added; takes milliseconds.

        Raises:
            ValueError: If a token's id is another's.
        """
        return _ExtendedTokenTable(self, added)

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


class _ExtendedTokenTable(TokenTable):
    """The tokens of a base model and those that an adapter adds; what the base has is kept once, in the base's table."""

    def __init__(self, base: TokenTable, added: Sequence[AddedToken]) -> None:
        self.tokenizer = extended_tokenizer(base.tokenizer, added)
        self.is_byte_level = base.is_byte_level
        gaps = gap_ids(self.tokenizer)
        special = {token.id for token in added if token.special and self._is_skipped(token.id)}
        self.special_ids = base.special_ids | special | gaps
        self._base = base
        self._bytes = dict.fromkeys(gaps, b"")
        self._bytes |= {token.id: self._compute_bytes(token.id) for token in added}

    def token_bytes(self, token_id: int) -> bytes:
        own = self._bytes.get(token_id)
        return self._base.token_bytes(token_id) if own is None else own

    def _is_skipped(self, token_id: int) -> bool:
        # The library shows special tokens that its normaliser changes: it looks for the changed text among the special ones.
        return not self.tokenizer.decode([token_id], skip_special_tokens=True)

    @functools.cached_property
    def anchor(self) -> int | None:
        return self._base.anchor
