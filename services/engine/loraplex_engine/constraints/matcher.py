"""A compiled constraint, and the state of an output that it holds for."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

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


OUTPUTS_PER_LEXER: Final = 4
"""Outputs that share a lexer before another is made for the next."""


class Lexer:
    """What is compiled of a grammar, once: its outputs share the lexer, and one thread at a time uses that.

    Attributes:
        matcher: The library's, at the beginning of a text.
        outputs: The states that share the lexer and still live.

    Args:
        matcher: One that shares nothing.
    """

    __slots__ = ("matcher", "outputs")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.outputs: WeakSet[GrammarState] = WeakSet()


class Grammar:
    """A grammar of the library with what is compiled of it; any thread may use it.

    Outputs share a lexer, which keeps what it has learned for all of them, and take turns at it. Where many live at once, a
    grammar that compiles quickly gets several lexers, so that masks are computed in parallel. If one runs out of its bounds,
    all that share it see the error; each then gets a lexer of its own, so that only an output whose own text costs too
    much ends.

    Attributes:
        is_spent: Whether a shared lexer has reached its bounds.

    Args:
        text: The library's JSON list of grammars.
        vocabulary: The model's tokens.
        limits: Bounds of the library's lexer and parser.
        max_lexers: Most lexers that outputs share.

    Raises:
        ValueError: If the grammar cannot be compiled.
    """

    def __init__(self, text: str, vocabulary: Vocabulary, limits: LLParserLimits, max_lexers: int = 1) -> None:
        self._text = text
        self.vocabulary = vocabulary
        self._limits = limits
        began_s = time.thread_time()  # of this thread: a busy machine makes no grammar slow
        self._lexers = [Lexer(self.compile())]
        self._compile_s = time.thread_time() - began_s
        self._max_lexers = max_lexers if self.is_quick else 1
        self._lock = threading.Lock()
        self.is_spent = False

    @property
    def num_lexers(self) -> int:
        """How many lexers outputs share."""
        return len(self._lexers)

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

    def join(self, output: GrammarState) -> Lexer:
        """Return the lexer of a new output: that of the fewest others, or its own if a shared one has reached its bounds."""
        if self.is_spent:
            return Lexer(self.compile())
        with self._lock:
            lexer = min(self._lexers, key=lambda each: len(each.outputs))
            if len(lexer.outputs) >= OUTPUTS_PER_LEXER and len(self._lexers) < self._max_lexers:
                lexer = Lexer(self.compile())
                self._lexers.append(lexer)
            lexer.outputs.add(output)
        return lexer


class GrammarState:
    """A constraint's state for one running output; one thread at a time uses it.

    Attributes:
        grammar: What it shares with other outputs.
        lexer: What it shares with some of them.
        matcher: The library's state.

    Args:
        grammar: The constraint.
        starts_after: Token ids that must come, in this order, before the constraint holds.
    """

    __slots__ = (
        "__weakref__",
        "_error",
        "_free_for",
        "_num_rebuilds",
        "_recent",
        "_tokens",
        "grammar",
        "lexer",
        "matcher",
    )

    def __init__(self, grammar: Grammar, starts_after: tuple[int, ...]) -> None:
        self.grammar = grammar
        self._free_for = starts_after
        self._recent: list[int] = []
        self._tokens: list[int] = []
        self._error: ConstraintError | None = None
        self._num_rebuilds = 0
        self.lexer = grammar.join(self)
        self.matcher = self.lexer.matcher.deep_copy()

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
        self.lexer.outputs.discard(self)
        self.lexer, self.matcher = Lexer(matcher), matcher
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
