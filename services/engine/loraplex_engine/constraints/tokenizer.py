"""The base model's tokenizer as constraints see it: the bytes of each token, and the tokens that end a text."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from llguidance import LLTokenizer
from loraplex_common.errors import InvalidParameterError
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FIELD: Final = "structured_output"
"""The request field that errors name."""
_CHARACTER: Final = r'[^"\\\x00-\x1F\x7F]'
"""What a JSON string holds without an escape."""
_LENGTHS: Final = (*range(1, 11), 30)
SLICES: Final = [r"[\x20\x0A\x0D\x09]+", *(f"{_CHARACTER}{{1,{length}}}" for length in _LENGTHS), f"{_CHARACTER}+"]
"""Sets of tokens that the library allows at once where a text may go on with each of them, instead of walking through them.

They are the library's, for JSON, with one more for each length below ten: near the end of a string of bounded length only short
tokens fit. Masks are the same with any slices.
"""

_log = get_logger()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer that masks can be computed for; shared by all constraints of an engine.

    Attributes:
        tokenizer: The tokenizer as the library has it.
        vocab_size: V, the rows of the model's embedding.
        num_tokens: Tokens of the tokenizer; ids from there up to V are padding that no mask allows.
        eos_token_ids: All ids that end a text.
        special_tokens: Text -> id of the tokens that text as such cannot contain, such as ``<|im_end|>``.
    """

    tokenizer: LLTokenizer
    vocab_size: int
    num_tokens: int
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, int]

    @property
    def num_words(self) -> int:
        """32-bit words of a mask."""
        return (self.vocab_size + 31) // 32

    @property
    def is_wider_than_model(self) -> bool:
        """Whether the tokenizer has tokens that the model has no row for, so that its masks must be cut."""
        return bool(self.tokenizer.vocab_size > self.vocab_size)

    @cached_property
    def real_tokens(self) -> NDArray[np.int32]:
        """The mask, int32 [ceil(V / 32)], of all tokens that are no padding."""
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[: min(self.num_tokens, self.vocab_size)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


class VocabularySource:
    """Reads the tokenizer when the first request needs it, once; any thread may ask.

    Args:
        model: Directory of the base model.
        vocab_size: Rows of the model's embedding.
        eos_token_ids: The model's end-of-text ids.
    """

    def __init__(self, model: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model = model
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._refusal: str | None = None

    def get(self) -> Vocabulary:
        """Return the vocabulary; the first call takes about a second.

        Raises:
            InvalidParameterError: If the model has no tokenizer.json, or one that no masks can be computed for.
        """
        with self._lock:
            if self._vocabulary is None and self._refusal is None:
                try:
                    self._vocabulary = self._read()
                except ValueError as error:
                    self._refusal = f"this model cannot be constrained: {error}"
                    _log.warning("structured output is refused", reason=str(error), model=str(self._model))
            if self._vocabulary is None:
                raise InvalidParameterError(self._refusal or "", field=FIELD)
            return self._vocabulary

    @property
    def tokenizer_file(self) -> Path:
        """Where the tokenizer is read from."""
        return self._model / "tokenizer.json"

    def _read(self) -> Vocabulary:
        if not self.tokenizer_file.is_file():
            raise ValueError("it has no tokenizer.json; add the tokenizer that the model was trained with")
        text = self.tokenizer_file.read_text(encoding="utf-8")
        return make_vocabulary(text, vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids)


def make_vocabulary(text: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json.

    Args:
        text: The file's text.
        vocab_size: Rows of the model's embedding.
        eos_token_ids: The model's end-of-text ids.

    Raises:
        ValueError: If the tokenizer is of a kind that cannot be mapped to bytes, or no token ends a text.
    """
    settings = json.loads(text)
    if settings.get("truncation") or settings.get("padding"):  # they would cut or pad what a grammar forces
        text = json.dumps(settings | {"truncation": None, "padding": None})
    num_tokens = _count_tokens(settings)
    eos = [token_id for token_id in eos_token_ids if token_id < num_tokens]
    if not eos:
        raise ValueError("it has no end-of-text token; name one in generation_config.json (eos_token_id)")
    return Vocabulary(
        tokenizer=LLTokenizer(text, n_vocab=max(vocab_size, num_tokens), eos_token=eos, slices=SLICES),
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        eos_token_ids=tuple(eos),
        special_tokens=_special_tokens(settings),
    )


def _count_tokens(settings: dict[str, Any]) -> int:
    vocab = settings["model"]["vocab"]
    pieces = {piece for piece, *_ in vocab} if isinstance(vocab, list) else set(vocab)
    return len(pieces | {token["content"] for token in settings.get("added_tokens") or ()})


def _special_tokens(settings: dict[str, Any]) -> dict[str, int]:
    """Return the added tokens that the library keeps apart from text: special ones, and all in angle brackets."""
    return {
        token["content"]: token["id"]
        for token in settings.get("added_tokens") or ()
        if token.get("special") or (token["content"].startswith("<") and token["content"].endswith(">"))
    }
