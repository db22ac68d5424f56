"""What bounds the constraints of an engine, and the defaults of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llguidance import LLParserLimits

KIB: Final = 1024
MIB: Final = 1024 * KIB

MAX_TEXT_BYTES: Final = 512 * KIB
MAX_CACHE_BYTES: Final = 256 * MIB
COMPILE_TIMEOUT_S: Final = 5.0
MAX_LITERAL_BYTES: Final = 16 * KIB
"""Longest literal text within a constraint: a mask inside a literal costs time in proportion to what is left of it."""
MAX_SHARE_OF_CACHE: Final = 8
"""What part of the cache the lexers of one constraint may take, as its denominator; a single one may take more."""
LEARNED_BYTES: Final = 2 * MIB
"""What a lexer comes to take beyond its compile: 1.5 MiB after 1,600 tokens of a schema, 2.2 with a vocabulary of 128,000."""
MAX_DEPTH: Final = 64
"""Deepest nesting of JSON objects and arrays in a schema or tag; the library's reader stops at 128 levels, with its own."""
MAX_JSON_BLANKS: Final = 64
"""Most blanks in one place of an output in JSON: enough to indent deep values, too few to go on for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstraintLimits:
    """What a constraint may cost.

    Attributes:
        max_text_bytes: Longest constraint.
        compile_timeout_s: Processor time and wall time after which a compile is given up.
        compile_memory_bytes: Memory that a compile may take.
        num_compiles: Compiles at once; others wait.
        max_cache_bytes: Memory of the compiled constraints that are kept for further requests.
        max_cache_entries: Most of them.
        refusal_ttl_s: How long the reason why a constraint cannot be compiled is kept.
        max_lexers: Most lexers of one compiled constraint; each takes memory like the first, and one thread at a time uses it.
        max_lexer_states: Most states that one lexer may keep; about 1 KiB each.
        max_step_fuel: What the text of one mask may cost, in derivatives of regular expressions.
        max_step_items: What the grammar of one mask may cost, in items of the parser.
        max_row_items: Items of the parser after one byte; an optional property of an object takes four.
        compact_json: Whether JSON is written without any blanks.
    """

    max_text_bytes: int = MAX_TEXT_BYTES
    compile_timeout_s: float = COMPILE_TIMEOUT_S
    compile_memory_bytes: int = 512 * MIB
    num_compiles: int = 2
    max_cache_bytes: int = MAX_CACHE_BYTES
    max_cache_entries: int = 256
    refusal_ttl_s: float = 30.0
    max_lexers: int = 8
    max_lexer_states: int = 50_000
    max_step_fuel: int = 100_000
    max_step_items: int = 5_000
    max_row_items: int = 2_000
    compact_json: bool = False

    def lexers_of(self, num_bytes: int) -> int:
        """Return how many lexers a constraint may have that takes so many bytes compiled: one does not fill the cache."""
        return max(1, min(self.max_lexers, self.max_cache_bytes // MAX_SHARE_OF_CACHE // max(1, num_bytes)))

    def of_library(self) -> LLParserLimits:
        """Return the bounds of the library's lexer and parser."""
        return LLParserLimits(
            max_lexer_states=self.max_lexer_states,
            step_lexer_fuel=self.max_step_fuel,
            step_max_items=self.max_step_items,
            max_items_in_row=self.max_row_items,
            verbose_errors=False,
        )
