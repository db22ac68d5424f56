"""A compiled constraint, and the state of an output that it holds for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from llguidance import LLMatcher
from loraplex_common.errors import InvalidParameterError

from loraplex_engine.constraints.tokenizer import FIELD
from loraplex_engine.constraints.types import ConstraintCostError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLParserLimits

    from loraplex_engine.constraints.tokenizer import Vocabulary

MAX_REBUILD_S: Final = 0.05
"""Longest compile that a running output may wait for."""
MAX_REBUILDS: Final = 2
"""Lexers of its own that one output may use up: the first end may be another output's doing, the second is not."""
TOO_COSTLY: Final = "the next token's mask costs too much; make it simpler, with fewer repetitions in repetitions"
LEXER_ERROR: Final = "lexer error"
"""How the library begins what it says of a lexer, which outputs share."""


class Grammar:
    """A grammar of the library with what is compiled of it; any thread may use it.

    Outputs share one lexer, which keeps what it has learned for all of them. If it runs out of its bounds, all of them
    see the error; each then gets a lexer of its own, so that only an output whose own text costs too much ends.

    Attributes:
        is_spent: Whether the shared lexer has reached its bounds.

    Args:
        text: The library's JSON list of grammars.
        vocabulary: The model's tokens.
        limits: Bounds of the library's lexer and parser.

    Raises:
        ValueError: If the grammar cannot be compiled.
    """

    def __init__(self, text: str, vocabulary: Vocabulary, limits: LLParserLimits) -> None:
        self._text = text
        self.vocabulary = vocabulary
        self._limits = limits
        began_s = time.thread_time()  # of this thread: a busy machine makes no grammar slow
        self._shared = self.compile()
        self._compile_s = time.thread_time() - began_s
        self.is_spent = False

    def compile(self) -> LLMatcher:
        """Return a matcher that shares nothing.

        Raises:
            ValueError: If the grammar cannot be compiled.
        """
        matcher = LLMatcher(self.vocabulary.tokenizer, self._text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error().removesuffix("\n<non-verbose/>"))
        return matcher

    @property
    def is_quick(self) -> bool:
        """Whether a running output can wait for a compile of its own; the step waits with it."""
        return self._compile_s <= MAX_REBUILD_S

    def matcher(self) -> LLMatcher:
        """Return a matcher at the beginning of a text; it shares the lexer unless that has reached its bounds."""
        return self.compile() if self.is_spent else self._shared.deep_copy()


class GrammarState:
    """A constraint's state for one running output; one thread at a time uses it.

    Attributes:
        grammar: What it shares with other outputs.
        matcher: The library's state.

    Args:
        grammar: The constraint.
        starts_after: Token ids that must come, in this order, before the constraint holds.
    """

    __slots__ = ("_error", "_free_for", "_num_rebuilds", "_recent", "_tokens", "grammar", "matcher")

    def __init__(self, grammar: Grammar, starts_after: tuple[int, ...]) -> None:
        self.grammar = grammar
        self._free_for = starts_after
        self._recent: list[int] = []
        self._tokens: list[int] = []
        self._error: ConstraintError | None = None
        self._num_rebuilds = 0
        self.matcher = grammar.matcher()

    @property
    def is_free(self) -> bool:
        """Whether any token may come, as what the constraint starts after has not come yet."""
        return bool(self._free_for)

    @property
    def is_ended(self) -> bool:
        """Whether only end-of-text can follow."""
        return not self._free_for and bool(self.matcher.is_stopped())

    def accept(self, token_id: int) -> None:
        """Take in a drawn token.

        Raises:
            ConstraintError: If the constraint does not allow it, or its mask could not be computed.
        """
        if self._error is not None:
            raise self._error
        if self._free_for:
            self._accept_free(token_id)
            return
        if not self.matcher.consume_token(token_id) and not (self.is_broken and self._rebuild(token_id)):
            is_costly = LEXER_ERROR in self.matcher.get_error()
            refused = f"token {token_id} is not allowed here: {_first_line(self.matcher)}"
            self._error = ConstraintCostError(TOO_COSTLY) if is_costly else ConstraintError(refused)
            raise self._error
        self._tokens.append(token_id)

    @property
    def is_broken(self) -> bool:
        """Whether the matcher has stopped for the costs of its lexer or parser."""
        return bool(self.matcher.is_error())

    def repair(self) -> bool:
        """Go on with a lexer of its own after a mask could not be computed; return whether that helps."""
        if self._error is not None or not self._rebuild():
            self.fail(ConstraintCostError(f"{TOO_COSTLY} ({_first_line(self.matcher)})"))
            return False
        return True

    def fail(self, error: ConstraintError) -> None:
        """Let the next `accept` raise an error, the first that came."""
        self._error = self._error or error

    def _accept_free(self, token_id: int) -> None:
        self._recent.append(token_id)
        del self._recent[: -len(self._free_for)]
        if tuple(self._recent) == self._free_for:
            self._free_for = ()

    def _rebuild(self, *further: int) -> bool:
        if LEXER_ERROR in self.matcher.get_error():
            self.grammar.is_spent = True  # further outputs would see the same error
        if not self.grammar.is_quick or self._num_rebuilds == MAX_REBUILDS:
            return False
        self._num_rebuilds += 1
        matcher = self.grammar.compile()
        if not matcher.consume_tokens([*self._tokens, *further]):
            return False
        self.matcher = matcher
        return True


class GrammarConstraint:
    """A `CompiledConstraint` of a grammar.

    Args:
        grammar: What is compiled.
        starts_after: Token ids after which it holds; empty: from the first token on.
    """

    def __init__(self, grammar: Grammar, starts_after: tuple[int, ...] = ()) -> None:
        self._grammar = grammar
        self._starts_after = starts_after

    def start(self, token_ids: Sequence[int]) -> GrammarState:
        """Return the state after these output tokens.

        Raises:
            InvalidParameterError: If the constraint does not allow the tokens.
        """
        state = GrammarState(self._grammar, self._starts_after)
        for position, token_id in enumerate(token_ids):
            try:
                state.accept(token_id)
            except ConstraintError as error:
                raise InvalidParameterError(
                    f"output token {position} does not fit the constraint: {error}", field=FIELD
                ) from None
        return state


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().split("\n", 1)[0] or "the grammar has no such continuation"
