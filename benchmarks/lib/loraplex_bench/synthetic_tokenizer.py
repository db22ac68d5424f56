"""A tokenizer.json of any size made in code, for machines that have no model's files: bytes, pieces of JSON, words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

END: Final = "</s>"
LETTERS: Final = "etaoinshrdlucmfwypvbgkjqxz"
OPENINGS: Final = ("", " ", '"', ' "', "_", "-")
PIECES: Final = (
    '{"',
    '":',
    '": ',
    '": "',
    '",',
    '", "',
    '"}',
    "},",
    "}, {",
    "[{",
    "}]",
    "true",
    "false",
    "null",
    "\n\n",
)


def byte_letters() -> dict[int, str]:
    """Return the letter that byte-level tokenizers write for each byte: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _texts() -> Iterator[str]:
    yield from PIECES
    yield from (" " * count for count in range(2, 17))
    yield from ("\n" + " " * count for count in range(1, 17))
    yield from (f"{number}" for number in range(10, 1000))
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, len(LETTERS) + 1)
    while True:
        letters = rng.choice(list(LETTERS), size=int(rng.integers(2, 9)), p=weights / weights.sum())
        word = "".join(letters)
        yield OPENINGS[int(rng.integers(len(OPENINGS)))] + (word.capitalize() if rng.random() < 0.2 else word)


def write_tokenizer(folder: Path, vocab_size: int) -> int:
    """Write ``tokenizer.json`` of exactly ``vocab_size`` tokens; returns the id of its end-of-text token."""
    letters = byte_letters()
    vocab = {letter: index for index, letter in enumerate(letters[byte] for byte in range(256))}
    texts = _texts()
    while len(vocab) < vocab_size - 1:
        token = "".join(letters[byte] for byte in next(texts).encode())
        vocab.setdefault(token, len(vocab))
    eos = len(vocab)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    settings = {
        "version": "1.0",
        "added_tokens": [{"id": eos, "content": END, "special": True, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**vocab, END: eos}, "merges": []},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    return eos
