"""Texts that separate tokenizers: every token in context, short runs of kinds of characters, numbers, spaces, code."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

# One or two characters of each kind that normalisers and pre-tokenisers treat in a way of its own.
_KINDS: Final = (
    *("a", "B", "s", "t", "'", "\u2019", ".", ",", "-", "_", "/", "(", '"', "$", "^"),
    *("0", "7", "\u0663", "\u00bd", "\u00b2"),  # digits, another script's, a fraction, a superscript
    *(" ", "\n", "\r", "\t", "\u00a0", "\u2003", "\u200b", "\u2028"),  # spaces
    *(
        "\u00e9",
        "e\u0301",
        "\u00df",
        "\u0130",
        "\ufb01",
        "\uff21",
        "\u2126",
        "\u1e9b\u0323",
    ),  # composed, cased, compatibility
    *("\u4f60", "\u3042", "\uac00", "\u0627", "\u05d0", "\u0939\u093f", "\u0e01\u0e33"),  # other scripts
    *("\U0001f600", "\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea", "\U0001d400"),  # beyond the first plane
    *("\u2581", "\u0120", "\ufffd", "\ufeff", "\u00ad", "\x00", "\x7f"),  # tokenizers' own characters, and controls
)
_PASSAGES: Final = (
    "It's we're I'LL they'd you'Ve 'tis 'Twas don't DON'T o'clock rock'n'roll",
    "1 22 333 4444 55555 1234567890123 3.14159 1,000,000.00 -5 2026-12-01 12:34:56 0x1F 1e-9",
    "def f(x):\n    if x  ==  1:\n\t\treturn\n\n\n    # comment   \r\n",
    "https://example.org/a?b=c&d=%20#e  user@example.org  C:\\path\\file.txt",
    "CamelCase snake_case kebab-case SCREAMING_CASE mixedUP123abc",
    "Gr\u00fc\u00dfe aus K\u00f6ln, \u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "Hello <b>world</b> {{ x }} {% y %} [INST] <<SYS>> ### <|x|> </s>",
)
_AROUND: Final = (("", ""), (" ", ""), ("", " "), ("a", "b"), ("  ", "  "), ("\n", "\n"), ("7", "7"), (".", "."))


def probes(vocabulary: Mapping[str, int], added: Collection[str]) -> Iterator[str]:
    """Yield texts; some 200,000, plus the vocabulary.

    Args:
        vocabulary: Token -> id; byte-level and SentencePiece spellings are turned into text.
        added: Tokens that are matched before all others, and literal texts that a part looks for.
    """
    yield from _PASSAGES
    for token in added:
        for before, after in _AROUND:
            yield before + token + after
        yield token.upper() + " " + token.lower()
    for length in (1, 2, 3):
        for kinds in itertools.product(_KINDS, repeat=length):
            yield "".join(kinds)
    for count in range(1, 40):
        for character in (" ", "\n", "\t", "0", "a", "-", "="):
            yield f"x{character * count}y"
    bytes_of = _byte_level()
    for token in vocabulary:
        text = _text_of(token, bytes_of)
        yield text
        yield f"{text} {text}"


def _text_of(token: str, bytes_of: Mapping[str, int]) -> str:
    """Return the text that a token stands for, as far as a single token determines it."""
    if all(character in bytes_of for character in token):
        return bytes(bytes_of[character] for character in token).decode(errors="replace")
    return token.replace("\u2581", " ")


def _byte_level() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each byte: printable bytes are themselves, the others follow U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
