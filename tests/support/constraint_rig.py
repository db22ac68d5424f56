"""Constraints for tests without an engine: compiled in this process, and walked by random tokens."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.errors import InvalidParameterError
from loraplex_engine.constraints.limits import ConstraintLimits
from loraplex_engine.constraints.matcher import Grammar, GrammarConstraint
from loraplex_engine.constraints.tokenizer import Vocabulary, make_vocabulary
from loraplex_engine.constraints.trial import Trial, try_constraint
from support.tokenizers_for_tests import byte_level_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from loraplex_common.structured_output import ConstraintKind
    from loraplex_engine.constraints.matcher import GrammarState
    from numpy.typing import NDArray

LIMITS: Final = ConstraintLimits()
EOS: Final = 1  # </s> of the tests' tokenizer
PADDED_VOCAB_SIZE: Final = 350


@functools.cache
def small_vocabulary() -> Vocabulary:
    """Return the tests' byte-level tokenizer with padding, as constraints see it."""
    return make_vocabulary(byte_level_tokenizer().to_str(), vocab_size=PADDED_VOCAB_SIZE, eos_token_ids=(EOS,))


def compile_here(
    kind: ConstraintKind, text: str, vocabulary: Vocabulary | None = None, limits: ConstraintLimits = LIMITS
) -> GrammarConstraint:
    """Return a constraint that has come through its trial, both in this process.

    Raises:
        InvalidParameterError: If it is refused.
    """
    vocabulary = vocabulary or small_vocabulary()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "grammar"
        trial = Trial(number=1, kind=kind.value, text=text, grammar_file=str(file))
        if reason := try_constraint(trial, vocabulary, limits):
            raise InvalidParameterError(reason)
        return GrammarConstraint(Grammar(file.read_text(encoding="utf-8"), vocabulary, limits.of_library()))


def takes(constraint: GrammarConstraint, text: str, vocabulary: Vocabulary | None = None) -> bool:
    """Return whether a text is an output that the constraint lets end there."""
    vocabulary = vocabulary or small_vocabulary()
    ids = vocabulary.tokenizer.tokenize_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        constraint.start([*ids, vocabulary.eos_token_ids[0]])
    except InvalidParameterError:
        return False
    return True


def begins(constraint: GrammarConstraint, text: str) -> bool:
    """Return whether a text is the beginning of an output."""
    try:
        constraint.start(small_vocabulary().tokenizer.tokenize_str(text))
    except InvalidParameterError:
        return False
    return True


def allowed_ids(mask: NDArray[np.int32]) -> list[int]:
    """Return the token ids of one mask, int32 [words]."""
    return [int(token_id) for token_id in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


def mask_of(state: GrammarState, vocabulary: Vocabulary | None = None) -> list[int]:
    """Return the token ids that may come next, as the engine's filler has them."""
    filler: Any = filler_of(vocabulary or small_vocabulary())
    out = np.zeros((1, (vocabulary or small_vocabulary()).num_words), np.int32)
    filler.fill([state], out)
    return allowed_ids(out[0])


class _Source:
    """The part of a `VocabularySource` that fillers use."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def get(self) -> Vocabulary:
        return self._vocabulary


def filler_of(vocabulary: Vocabulary, num_threads: int = 1) -> Any:
    """Return a mask filler for a vocabulary."""
    from loraplex_engine.constraints.masks import GrammarMaskFiller

    return GrammarMaskFiller(_Source(vocabulary), num_threads)  # type: ignore[arg-type]


def walk(state: GrammarState, rng: Random, *, max_tokens: int, vocabulary: Vocabulary | None = None) -> Sequence[int]:
    """Draw allowed tokens, each as likely as any other, until the output ends or is cut; return them without its end."""
    vocabulary = vocabulary or small_vocabulary()
    ids: list[int] = []
    while len(ids) < max_tokens and not state.is_ended:
        token_id = rng.choice(mask_of(state, vocabulary))
        if token_id in vocabulary.eos_token_ids:
            break
        state.accept(token_id)
        ids.append(token_id)
    return ids
