"""How far requests are expected to grow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_engine.scheduler.decode_state import DecodeState
from loraplex_engine.scheduler.expected_lengths import FIRST_GUESS, ExpectedLengths, peak_growth

BLOCK = 4


def test_before_anything_was_learnt_a_request_is_expected_to_draw_what_it_may() -> None:
    lengths = ExpectedLengths(0.9)

    assert lengths.of(70, is_open_ended=False) == 70
    assert lengths.of(10_000, is_open_ended=True) == FIRST_GUESS


def test_the_expectation_is_the_quantile_of_recent_outputs_within_a_quarter_octave() -> None:
    lengths = ExpectedLengths(0.9)
    rng = np.random.default_rng(0)
    drawn = rng.integers(1, 1000, size=2000)
    for length in drawn.tolist():
        lengths.observe(length)

    exact = np.quantile(drawn, 0.9)
    assert exact * 0.8 <= lengths.expected <= exact * 1.3
    assert lengths.of(50, is_open_ended=False) == 50


def test_the_expectation_follows_a_change() -> None:
    lengths = ExpectedLengths(0.9)
    for _ in range(1000):
        lengths.observe(16)
    assert lengths.expected == pytest.approx(16)

    for _ in range(1000):
        lengths.observe(256)
    assert lengths.expected == pytest.approx(256)


@pytest.mark.parametrize(("quantile", "expected"), [(0.0, 0.0), (1.0, math.inf)])
def test_the_ends_of_the_scale_do_not_learn(quantile: float, expected: float) -> None:
    lengths = ExpectedLengths(quantile)
    for _ in range(50):
        lengths.observe(7)

    assert lengths.expected == expected


def _state(rows: list[tuple[int, int, int]]) -> DecodeState:
    """Return rows of (prompt, drawn, limit), holding the blocks of what they know."""
    state = DecodeState(max_num_seqs=len(rows), max_model_len=512, block_tokens=BLOCK)
    for slot, (prompt, drawn, limit) in enumerate(rows):
        state.num_prompt_tokens[slot] = prompt
        state.next_position[slot] = drawn
        state.max_outputs[slot] = limit
        state.num_blocks[slot] = -(-(prompt + drawn) // BLOCK)
    return state


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 30), st.integers(1, 80)).map(lambda r: (r[0], r[1], r[1] + r[2])),
        max_size=8,
    ),
    known=st.integers(1, 60),
    more=st.integers(1, 80),
)
def test_the_peak_is_that_of_a_run_step_by_step(rows: list[tuple[int, int, int]], known: int, more: int) -> None:
    state = _state(rows)
    own_blocks = -(-known // BLOCK)

    peak = peak_growth(
        state,
        np.arange(len(rows)),
        expected=math.inf,
        num_known=known,
        num_more=more,
        num_blocks=own_blocks,
    )

    sequences = [(prompt + drawn, limit - drawn) for prompt, drawn, limit in rows] + [(known, more)]
    held = sum(-(-tokens // BLOCK) for tokens, _ in sequences)
    needs = [
        sum(-(-(tokens + step) // BLOCK) for tokens, left in sequences if left >= step) - held
        for step in range(1 + max(left for _, left in sequences))
    ]
    # a page per row is rounded on average, not row by row
    assert abs(peak - max(0, *needs)) <= 0.5 * len(sequences) + 1


def test_who_drew_more_than_expected_is_expected_to_draw_one_more_block() -> None:
    state = _state([(10, 50, 500)])

    peak = peak_growth(state, np.arange(1), expected=20.0, num_known=1, num_more=0, num_blocks=1)

    assert 0 < peak < 3
