"""Estimates how far running requests will grow, so that a request admitted now need not be preempted later.

How many tokens a request will draw is not known; how many it may draw is an upper bound that few requests reach. The
expected length is a quantile of what requests drew lately, and never more than what the request may draw.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from loraplex_engine.scheduler.decode_state import DecodeState, Rows

_DECAY: Final = 0.995  # per observed request; the last few hundred requests count
_BUCKETS_PER_OCTAVE: Final = 4
_NUM_BUCKETS: Final = 20 * _BUCKETS_PER_OCTAVE + 1
_MIN_OBSERVED: Final = 8.0
FIRST_GUESS: Final = 256
"""Tokens expected of a request without a limit of its own, before any request was observed."""


class ExpectedLengths:
    """A decayed histogram of output lengths, in steps of a quarter octave.

    Args:
        quantile: Quantile of the observed lengths; 0 expects no token at all, 1 expects all that a request may draw.
    """

    def __init__(self, quantile: float) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile {quantile} is not between 0 and 1")
        self._quantile = quantile
        self._weights = np.zeros(_NUM_BUCKETS)
        self._scale = 1.0  # weight of the next request; it rises, so that the weights before need not decay
        self._total = 0.0
        self._expected = math.inf if quantile else 0.0

    def observe(self, num_outputs: int) -> None:
        """Add the number of tokens that an ended request drew."""
        bucket = math.ceil(_BUCKETS_PER_OCTAVE * math.log2(max(1, num_outputs)))
        self._scale /= _DECAY
        self._weights[min(bucket, _NUM_BUCKETS - 1)] += self._scale
        if self._scale > 1e100:
            self._weights /= self._scale
            self._scale = 1.0
        self._total = self._total * _DECAY + 1.0
        if 0 < self._quantile < 1 and self._total >= _MIN_OBSERVED:
            cumulated = self._weights.cumsum()
            found = int(cumulated.searchsorted(self._quantile * cumulated[-1]))
            self._expected = 2.0 ** (found / _BUCKETS_PER_OCTAVE)

    @property
    def expected(self) -> float:
        """Expected outputs of a request that may draw any number; infinity before anything was learnt."""
        return self._expected

    def of(self, max_outputs: int, *, is_open_ended: bool) -> float:
        """Return how many tokens a request is expected to draw."""
        guess = FIRST_GUESS if is_open_ended and self._expected == math.inf else self._expected
        return min(float(max_outputs), guess)


def peak_growth(
    state: DecodeState, rows: Rows, *, expected: float, num_known: int, num_more: float, num_blocks: int
) -> float:
    """Return the most pages that running requests and one more will need beyond those they hold.

    Requests give pages back as they end, so the need is highest just before one of them ends. With the requests in
    order of falling ``more``, the outputs that each will still draw, this holds just before request k ends:

        [0, k + 1)        run: each has known + more[k] tokens; rounding up to pages costs half a page on average
        [k + 1, N + 1)    have ended, and gave back their own pages, those not shared with other requests

    The result is the largest need over all k.

    Args:
        state: Rows.
        rows: Running requests, ``[N]``.
        expected: Outputs expected of a request; one that has drawn as many is expected to draw one more block.
        num_known: Tokens of the one more request.
        num_more: Outputs expected of it.
        num_blocks: Blocks that it holds at its start.
    """
    size = state.block_tokens
    drawn = state.next_position.take(rows).astype(np.float64)
    left = state.max_outputs.take(rows) - drawn
    num_rows = len(rows)
    columns = np.empty((4, num_rows + 1))
    more, known, held, own = columns  # views; the last entry of each is the one more request
    more[:num_rows] = np.minimum(left, np.maximum(expected - drawn, size if expected else 0.0))
    known[:num_rows] = state.num_prompt_tokens.take(rows) + drawn
    held[:num_rows] = state.num_blocks.take(rows)
    own[:num_rows] = held[:num_rows] - state.num_shared_blocks.take(rows)
    columns[:, num_rows] = num_more, num_known, num_blocks, num_blocks
    columns = columns.take((-more).argsort(kind="stable"), axis=1)
    more, (known, held, own) = columns[0], columns[1:].cumsum(axis=1)
    alive = np.arange(1, num_rows + 2)
    needed = (known + alive * more) / size + 0.5 * alive - held
    given_back = own[-1] - own
    return float(max(0.0, (needed - given_back).max()))
