"""Fills the masks of a step's constrained rows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from loraplex_engine.constraints.matcher import TOO_COSTLY, GrammarState
from loraplex_engine.constraints.types import ConstraintCostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loraplex_engine.constraints.tokenizer import Vocabulary, VocabularySource
    from loraplex_engine.constraints.types import ConstraintState

MIN_ROWS_IN_PARALLEL: Final = 4
MAX_THREADS: Final = 16


def default_num_threads() -> int:
    """Return most of the cores: one is for the step loop's thread, which waits for the others, and the event loop's."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) - 1))


class GrammarMaskFiller:
    """A `MaskFiller` for the states of this package's constraints.

    Args:
        source: The model's tokens.
        num_threads: Threads that compute masks; None takes most of the cores.
    """

    def __init__(self, source: VocabularySource, num_threads: int | None = None) -> None:
        self._source = source
        self._num_threads = num_threads or default_num_threads()
        self._executors: dict[int, LLExecutor] = {}

    def fill(self, states: Sequence[ConstraintState], out: NDArray[np.int32]) -> None:
        """Write the mask of the next token of each state; `MaskFiller` has the details."""
        if not states:
            return
        vocabulary = self._source.get()
        self._check(vocabulary, out, len(states))
        if out.shape[1] > vocabulary.num_words:
            masks = np.empty((len(states), vocabulary.num_words), np.int32)
            self.fill(states, masks)
            out[:, : vocabulary.num_words], out[:, vocabulary.num_words :] = masks, 0
            self._free(states, out)
            return
        rows = [state for state in states if isinstance(state, GrammarState)]
        assert len(rows) == len(states), "states of another kind of constraint"
        target = out
        if vocabulary.is_wider_than_model:
            target = np.empty((len(rows), (vocabulary.tokenizer.vocab_size + 31) // 32), np.int32)
        bound = [(state, row) for row, state in enumerate(rows) if not state.is_free]
        self._compute(bound, target)
        self._repair(bound, target)
        if target is not out:
            out[:] = target[:, : out.shape[1]]
        if vocabulary.num_tokens != vocabulary.vocab_size:
            out &= vocabulary.real_tokens
        if len(bound) < len(rows):
            self._free(rows, out)

    @staticmethod
    def _free(states: Sequence[ConstraintState], out: NDArray[np.int32]) -> None:
        """Allow everything that can be drawn where no constraint holds yet: an adapter's added tokens, too."""
        for row, state in enumerate(states):
            if isinstance(state, GrammarState) and state.is_free:
                out[row] = -1

    def _compute(self, bound: Sequence[tuple[GrammarState, int]], target: NDArray[np.int32]) -> None:
        """Compute masks without the interpreter's lock, which is given up once for all rows, not once for each.

        Outputs that share a lexer take turns at it: they lie beside each other, so that one thread has most of them, and
        there are about as many threads as lexers.
        """
        if len(bound) < MIN_ROWS_IN_PARALLEL or self._num_threads == 1:
            for state, row in bound:
                fill_next_token_bitmask(state.matcher, target, row)
            return
        num_lexers = len({id(state.lexer) for state, _ in bound})
        matchers = [(state.matcher, row) for state, row in sorted(bound, key=lambda entry: id(entry[0].lexer))]
        fill_next_token_bitmask_par(self._executor(num_lexers), matchers, target)

    def _executor(self, num_lexers: int) -> LLExecutor:
        """Return threads for so many lexers, of a few sizes so that few threads sleep beside them."""
        num_threads = min(1 << (num_lexers - 1).bit_length(), self._num_threads)
        if num_threads not in self._executors:
            self._executors[num_threads] = LLExecutor(num_threads)
        return self._executors[num_threads]

    @staticmethod
    def _repair(bound: Sequence[tuple[GrammarState, int]], target: NDArray[np.int32]) -> None:
        for state, row in bound:
            if state.is_broken and state.repair():
                fill_next_token_bitmask(state.matcher, target, row)
                if state.is_broken:
                    state.fail(ConstraintCostError(TOO_COSTLY))

    @staticmethod
    def _check(vocabulary: Vocabulary, out: NDArray[np.int32], num_rows: int) -> None:
        shape = (num_rows, max(vocabulary.num_words, out.shape[1]))
        if out.shape != shape or out.dtype != np.int32 or not out.flags.c_contiguous:
            raise ValueError(f"masks must be contiguous int32 {shape}, not {out.dtype} {out.shape}")
