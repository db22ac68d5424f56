"""The sampler draws from the distribution it was asked for, in vLLM's order of operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loraplex_engine.runners.sampler import Sampler
from loraplex_engine.runners.top_tokens import likeliest, likeliest_tokens
from loraplex_engine.step import SlotSetup
from support.plans import Draw, sampling_arrays

VOCAB = 128
CPU = torch.device("cpu")
EMPTY = np.empty(0, np.int32)


def make_logits(rows: int = 1, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 2


def sample(
    logits: torch.Tensor, draws: list[Draw], *, sampler: Sampler | None = None, positions: list[int] | None = None
) -> list[int]:
    sampler = sampler or Sampler(vocab_size=logits.shape[1], device=CPU)
    arrays = sampling_arrays(draws, positions or [0] * len(draws))
    return sampler.sample(logits, np.arange(len(draws), dtype=np.int32), arrays).token_ids.tolist()


def histogram(logits: torch.Tensor, draw: Draw, *, count: int = 20_000) -> np.ndarray:
    """Frequencies of tokens over many positions of one request."""
    sampler = Sampler(vocab_size=len(logits), device=CPU)
    arrays = sampling_arrays([draw] * count, list(range(count)))
    drawn = sampler.sample(logits.expand(count, -1), np.arange(count, dtype=np.int32), arrays).token_ids
    return np.bincount(drawn.numpy(), minlength=len(logits)) / count


def truncated(logits: torch.Tensor, draw: Draw) -> np.ndarray:
    """The distribution by its definition, in fp64."""
    values = logits.double().numpy() / draw.temperature
    probabilities = np.exp(values - values.max())
    probabilities[probabilities < draw.min_p * probabilities.max()] = 0
    order = np.argsort(-probabilities, kind="stable")
    if draw.top_k:
        probabilities[order[draw.top_k :]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[(before >= draw.top_p) & (np.arange(len(order)) > 0)]] = 0
    result: np.ndarray = probabilities / probabilities.sum()
    return result


@pytest.mark.parametrize(
    "draw",
    [
        Draw(temperature=1.0),
        Draw(temperature=0.6),
        Draw(temperature=1.3, top_k=7),
        Draw(temperature=1.0, top_p=0.7),
        Draw(temperature=1.2, min_p=0.1),
        Draw(temperature=1.1, top_k=20, top_p=0.8, min_p=0.02),
        Draw(temperature=1.0, top_p=0.01),
        Draw(temperature=1e-30),
    ],
    ids=str,
)
def test_frequencies_follow_the_truncated_distribution(draw: Draw) -> None:
    logits = make_logits(seed=4)[0]
    expected = truncated(logits, draw)

    found = histogram(logits, draw)

    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    assert np.abs(found - expected).sum() / 2 < 0.03  # total variation


def test_top_p_reaches_beyond_the_tokens_sorted_first() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 0.01

    found = histogram(logits, Draw(temperature=1.0, top_p=0.9), count=100)

    ranks = logits.argsort(descending=True).argsort()[torch.from_numpy(np.flatnonzero(found))]
    assert 1024 < int(ranks.max()) < 4600


def test_a_draw_does_not_depend_on_batch_row_or_truncated_neighbours() -> None:
    logits = make_logits(6)
    draws = [Draw(temperature=0.9, seed=row, top_k=5 * (row % 2), top_p=1 - 0.1 * (row % 3)) for row in range(6)]

    together = sample(logits, draws, positions=[3] * 6)

    alone = [sample(logits[row : row + 1], [draws[row]], positions=[3])[0] for row in range(6)]
    assert together == alone
    assert sample(logits.flip(0), draws[::-1], positions=[3] * 6) == together[::-1]


def test_greedy_rows_are_greedy_beside_random_ones() -> None:
    logits = make_logits(3)

    drawn = sample(logits, [Draw(), Draw(temperature=2.0, seed=1), Draw()])

    assert [drawn[0], drawn[2]] == logits.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize("vocab", [128, 100])
def test_greedy_takes_the_lowest_of_equal_tokens_in_either_memory_order(vocab: int) -> None:
    logits = torch.randint(0, 9, (5, vocab), generator=torch.Generator().manual_seed(0)).float()
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]

    for layout in (logits, logits.t().contiguous().t()):
        best, tokens = likeliest_tokens(layout)
        assert tokens.tolist() == expected
        assert torch.equal(best, logits.amax(-1))


def test_the_likeliest_are_in_the_order_of_a_stable_sort() -> None:
    values = (torch.randn((4, 500), generator=torch.Generator().manual_seed(3)) * 2).round()
    values[0, 7], values[0, 3], values[1, ::2] = -0.0, 0.0, float("-inf")
    expected, order = values.sort(dim=-1, descending=True, stable=True)

    for count in (1, 60, 500):
        found, ids = likeliest(values, count)
        assert torch.equal(ids, order[:, :count])
        assert torch.equal(found, expected[:, :count])


@pytest.mark.parametrize(
    ("draw", "kept"), [(Draw(temperature=1.0, top_k=9), 9), (Draw(temperature=1.0, top_p=0.25), 32)]
)
def test_of_equal_tokens_the_lowest_ids_are_kept(draw: Draw, kept: int) -> None:
    found = histogram(torch.zeros(VOCAB), draw, count=2000)

    assert np.flatnonzero(found).tolist() == list(range(kept))


def test_constraints_come_before_penalties_and_the_draw() -> None:
    logits = make_logits()
    best = int(logits.argmax())
    ranked = logits[0].argsort(descending=True).tolist()
    cases = [
        (
            SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, logit_bias={best: -100.0}),
            Draw(),
            ranked[1],
        ),
        (
            SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, logit_bias={ranked[9]: 100.0}),
            Draw(),
            ranked[9],
        ),
        (
            SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, allowed_token_ids=(ranked[5], ranked[3])),
            Draw(),
            ranked[3],
        ),
        (
            SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, stop_token_ids=tuple(ranked[:2])),
            Draw(ban_stops=True),
            ranked[2],
        ),
        (SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, stop_token_ids=(best,)), Draw(), best),
    ]

    for setup, draw, expected in cases:
        sampler = Sampler(vocab_size=VOCAB, device=CPU)
        sampler.occupy(setup)
        assert sample(logits, [draw], sampler=sampler) == [expected]


@pytest.mark.parametrize(
    ("setup", "is_kept"),
    [
        ({}, False),
        ({"stop_token_ids": (2,)}, True),
        ({"logit_bias": {1: 1.0}}, True),
        ({"allowed_token_ids": (1,)}, True),
        ({"uses_penalties": True}, True),
        ({"prompt_logprobs": 0}, True),
    ],
)
def test_only_occupants_that_the_arrays_do_not_describe_leave_the_fast_path(
    setup: dict[str, Any], is_kept: bool
) -> None:
    sampler = Sampler(vocab_size=VOCAB, device=CPU)
    slot = np.zeros(1, np.int32)
    before = SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, logit_bias={3: 1.0})
    sampler.occupy(before)

    sampler.occupy(SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, **setup))

    assert sampler.has_any(slot) is is_kept


def test_penalties_count_prompt_and_output_as_defined() -> None:
    logits = make_logits()
    prompt, output = np.array([1, 2], np.int32), np.array([2, 3, 3], np.int32)
    setup = SlotSetup(slot=0, prompt_token_ids=prompt, output_token_ids=output, uses_penalties=True)
    draw = Draw(
        repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3, num_logprobs=VOCAB, temperature=0.0
    )
    sampler = Sampler(vocab_size=VOCAB, device=CPU)
    sampler.occupy(setup)
    expected = logits[0].clone()
    for token in (1, 2, 3):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[2] -= 0.4 + 0.3
    expected[3] -= 0.4 + 0.3 * 2

    sampled = sampler.sample(logits, np.array([0], np.int32), sampling_arrays([draw], [3]))

    reported = sampled.logprobs_to_host()[0]
    found = np.empty(VOCAB, np.float32)
    found[reported.token_ids[1:]] = reported.logprobs[1:]
    np.testing.assert_allclose(found, expected.log_softmax(-1).numpy(), atol=1e-5)


def test_a_drawn_token_is_counted_for_the_next_draw() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5] = 1.0
    sampler = Sampler(vocab_size=8, device=CPU)
    sampler.occupy(SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, uses_penalties=True))
    draw = Draw(presence_penalty=2.0)

    first, second = (sample(logits, [draw], sampler=sampler)[0] for _ in range(2))

    assert first == 5
    assert second != 5


@pytest.mark.parametrize("asked", [[0], [0, -1], [0, 3], [0, 0, 1]])
def test_no_alternatives_are_a_legal_wish(asked: list[int]) -> None:
    logits, slots = make_logits(rows=len(asked)), np.arange(len(asked), dtype=np.int32)
    arrays = sampling_arrays([Draw(num_logprobs=count) for count in asked], [0] * len(asked))

    drawn = Sampler(vocab_size=VOCAB, device=CPU).sample(logits, slots, arrays)

    found = {row: len(entry.token_ids) for row, entry in drawn.logprobs_to_host().items()}
    assert found == {row: 1 + count for row, count in enumerate(asked) if count >= 0}
    assert not drawn.faults


def test_the_smallest_repetition_penalty_makes_a_seen_token_certain_and_no_row_invalid() -> None:
    sampler, logits = Sampler(vocab_size=VOCAB, device=CPU), make_logits()
    logits[0, 7] = 0.5
    setup = SlotSetup(slot=0, prompt_token_ids=np.array([7], np.int32), output_token_ids=EMPTY, uses_penalties=True)
    sampler.occupy(setup)

    drawn = sampler.sample(logits, np.zeros(1, np.int32), sampling_arrays([Draw(repetition_penalty=1.2e-38)], [0]))

    assert drawn.is_valid.tolist() == [True]
    assert drawn.token_ids.tolist() == [7]


def test_logprobs_are_reported_for_the_drawn_token_and_the_likeliest() -> None:
    logits = make_logits(3)
    draws = [Draw(num_logprobs=2), Draw(), Draw(temperature=3.0, seed=8, num_logprobs=0)]

    sampled = Sampler(vocab_size=VOCAB, device=CPU).sample(
        logits, np.arange(3, dtype=np.int32), sampling_arrays(draws, [0, 0, 0])
    )

    reported = sampled.logprobs_to_host()
    truth = logits.log_softmax(-1)
    assert sorted(reported) == [0, 2]
    assert reported[0].token_ids.tolist() == [int(sampled.token_ids[0]), *truth[0].topk(2).indices.tolist()]
    assert reported[2].token_ids.tolist() == [int(sampled.token_ids[2])]
    assert reported[2].logprobs[0] == pytest.approx(float(truth[2, sampled.token_ids[2]]), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("draw", [Draw(), Draw(temperature=1.0), Draw(temperature=1.0, top_k=3)], ids=str)
def test_logits_that_are_not_finite_invalidate_their_row_alone(bad: float, draw: Draw) -> None:
    logits = make_logits(3)
    logits[1, 7] = bad

    sampled = Sampler(vocab_size=VOCAB, device=CPU).sample(
        logits, np.arange(3, dtype=np.int32), sampling_arrays([draw] * 3, [0] * 3)
    )

    assert sampled.is_valid.tolist() == [True, False, True]


def test_nothing_left_to_draw_is_no_valid_draw() -> None:
    sampler = Sampler(vocab_size=VOCAB, device=CPU)
    sampler.occupy(
        SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, allowed_token_ids=(3,), stop_token_ids=(3,))
    )

    sampled = sampler.sample(
        make_logits(), np.array([0], np.int32), sampling_arrays([Draw(ban_stops=True, temperature=1.0)], [0])
    )

    assert sampled.is_valid.tolist() == [False]


@pytest.mark.parametrize("is_feature_major", [False, True])
@pytest.mark.parametrize("num_added", [3, 256])
def test_columns_of_tokens_that_a_row_has_not_change_no_draw(num_added: int, *, is_feature_major: bool) -> None:
    draws = [
        Draw(),
        Draw(temperature=2.0, seed=1),
        Draw(temperature=1.0, top_k=VOCAB, seed=2),
        Draw(temperature=1.0, top_k=VOCAB + 2, top_p=0.9, seed=3),
        Draw(temperature=1.5, top_p=0.99, min_p=0.001, seed=4),
        Draw(repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=0.5),
    ]
    draws = [replace(draw, num_logprobs=VOCAB) for draw in draws]
    narrow = make_logits(len(draws), seed=9)
    wide = torch.cat([narrow, torch.full((len(draws), num_added), float("-inf"))], dim=1)
    if is_feature_major:
        narrow, wide = narrow.t().contiguous().t(), wide.t().contiguous().t()
    found = []
    for logits in (narrow, wide):
        sampler, outcomes = Sampler(vocab_size=VOCAB + num_added, device=CPU), []
        seen = np.arange(9, dtype=np.int32)
        sampler.occupy(SlotSetup(slot=5, prompt_token_ids=seen, output_token_ids=seen, uses_penalties=True))
        for position in range(20):
            slots = np.arange(len(draws), dtype=np.int32)
            drawn = sampler.sample(logits, slots, sampling_arrays(draws, [position] * len(draws)))
            assert drawn.is_valid.all()
            outcomes.append((drawn.token_ids.tolist(), drawn.logprobs_to_host()))
        found.append(outcomes)

    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        for row, entry in one[1].items():
            assert entry.token_ids.tolist() == other[1][row].token_ids.tolist()
            assert entry.logprobs.tobytes() == other[1][row].logprobs.tobytes()


def test_penalties_count_added_tokens() -> None:
    sampler = Sampler(vocab_size=VOCAB + 4, device=CPU)
    setup = SlotSetup(slot=0, prompt_token_ids=EMPTY, output_token_ids=EMPTY, uses_penalties=True)
    sampler.occupy(setup)
    logits = torch.zeros((1, VOCAB + 4))
    logits[0, VOCAB + 2], logits[0, 7] = 3.0, 2.5

    drawn = [sample(logits, [Draw(frequency_penalty=2.0)], sampler=sampler)[0] for _ in range(3)]

    assert drawn == [VOCAB + 2, 7, VOCAB + 2]
    assert sample(logits[:, :VOCAB], [Draw(frequency_penalty=2.0)], sampler=sampler) == [7]
