"""The sampling kernel on the CPU, under sanitizers, through the engine's own sampler: against torch and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.sampling_cases import (
    EDGES,
    KINDS,
    NUM_SLOTS,
    compare,
    device_sampler,
    draw_by_reference,
    draw_on_device,
    make_batch,
    make_edge_batch,
    make_logits,
    make_masks,
)
from loraplex_engine.runners import sampled
from loraplex_engine.runners.sampler import Sampler
from loraplex_engine.step import SlotSetup
from loraplex_kernels.sampling.sample import NOT_FINITE, NOTHING_LEFT, VALID, Sample
from support.plans import Draw, sampling_arrays

if TYPE_CHECKING:
    from loraplex_engine.runners.cuda.sampling import DeviceSampler

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
CPU = torch.device("cpu")
NONE = np.zeros(0, np.int32)
ROWS = 24


def make_sampler(library: HostLibrary, vocab: int, *, block: int = 64, capacity: int = 128) -> DeviceSampler:
    """A list much smaller than the vocabulary, so that every way to find a limit is taken."""
    return device_sampler(library, vocab, Sample(library, vocab, block=block, list_capacity=capacity))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "dtype"), [(1000, torch.bfloat16), (403, torch.float32)])
def test_every_mix_of_parameters_draws_what_the_torch_sampler_draws(
    host_library: MakeHostLibrary, kind: str, vocab: int, dtype: torch.dtype
) -> None:
    steps = [make_logits(kind, ROWS, vocab, dtype, seed) for seed in range(2)]
    device = make_sampler(host_library(dtype), vocab)

    compare(device, Sampler(vocab_size=vocab, device=CPU), make_batch(ROWS, vocab, seed=len(kind)), steps)


@pytest.mark.parametrize("kind", ["peaked", "tied"])
def test_the_reference_draws_what_the_kernel_draws(host_library: MakeHostLibrary, kind: str) -> None:
    batch, logits = make_batch(ROWS, 403, seed=11), make_logits(kind, ROWS, 403, torch.bfloat16, 3)
    device = make_sampler(host_library(torch.bfloat16), 403)
    for setup in batch.setups:
        device.occupy(setup)
    expected = draw_by_reference(device, batch, logits, 5)

    found = draw_on_device(device, logits, batch.slots, batch.draws, 5, batch.masks(CPU))

    assert [token if ok else -1 for token, ok in zip(found.tokens, found.valid, strict=True)] == expected


def test_a_row_does_not_depend_on_its_batch_nor_on_the_size_of_the_list(host_library: MakeHostLibrary) -> None:
    library, batch = host_library(torch.bfloat16), make_batch(6, 1000, seed=2)
    logits = make_logits("peaked", 6, 1000, torch.bfloat16, 4)
    samplers = [make_sampler(library, 1000), device_sampler(library, 1000), make_sampler(library, 1000)]
    for sampler in samplers:
        for setup in batch.setups:
            sampler.occupy(setup)

    together = draw_on_device(samplers[0], logits, batch.slots, batch.draws, 7)

    as_served = draw_on_device(samplers[1], logits, batch.slots, batch.draws, 7)
    alone = [
        draw_on_device(samplers[2], logits[row : row + 1], batch.slots[row : row + 1], [batch.draws[row]], 7)
        for row in (5, 0, 3, 1, 4, 2)
    ]
    assert as_served.tokens == together.tokens
    assert [one.tokens[0] for one in alone] == [together.tokens[row] for row in (5, 0, 3, 1, 4, 2)]


def test_a_mask_draws_what_allowed_token_ids_draw(host_library: MakeHostLibrary) -> None:
    sampler, rng = make_sampler(host_library(torch.float32), 403), np.random.default_rng(5)
    tokens = {slot: np.sort(rng.choice(403, 30, replace=False)) for slot in range(len(DRAWS))}
    logits, slots = make_logits("peaked", len(DRAWS), 403, torch.float32, 1), np.arange(len(DRAWS), dtype=np.int32)
    masks = make_masks({slot: np.isin(np.arange(403), listed) for slot, listed in tokens.items()}, CPU)
    masked = draw_on_device(sampler, logits, slots, DRAWS, 3, masks)
    for slot, listed in tokens.items():
        allowed = tuple(listed.tolist())
        setup = SlotSetup(slot=slot, prompt_token_ids=NONE, output_token_ids=NONE, allowed_token_ids=allowed)
        sampler.occupy(setup)

    listed_ids = draw_on_device(sampler, logits, slots, DRAWS, 3)

    assert masked.tokens == listed_ids.tokens
    assert masked.logprobs.keys() == listed_ids.logprobs.keys() == {1}
    assert masked.logprobs[1].logprobs.tolist() == listed_ids.logprobs[1].logprobs.tolist()


def test_an_empty_mask_is_told_from_logits_that_are_not_finite(host_library: MakeHostLibrary) -> None:
    logits = make_logits("peaked", 2 * len(DRAWS), 403, torch.float32, 1)
    logits[:, 5] = float("nan")
    slots, draws = np.arange(2 * len(DRAWS), dtype=np.int32), [draw for draw in DRAWS for _ in range(2)]
    allowed = {row: np.arange(403) == (5 if row % 2 else 403) for row in range(2 * len(DRAWS))}

    sampler, masks = make_sampler(host_library(torch.float32), 403), make_masks(allowed, CPU)

    assert draw_on_device(sampler, logits, slots, draws, 0, masks).outcomes == [NOTHING_LEFT, NOT_FINITE] * len(DRAWS)
    oracle = Sampler(vocab_size=403, device=CPU)
    assert oracle.sample(logits, slots, sampling_arrays(draws, [0] * len(draws)), masks).outcomes.tolist() == [
        NOTHING_LEFT,
        NOT_FINITE,
    ] * len(DRAWS)


def test_the_engine_and_the_kernel_say_what_became_of_a_draw_by_the_same_numbers() -> None:
    assert (sampled.NOT_FINITE, sampled.VALID, sampled.NOTHING_LEFT) == (NOT_FINITE, VALID, NOTHING_LEFT)


DRAWS = [
    Draw(),
    Draw(temperature=1.0, num_logprobs=3),
    Draw(temperature=1.0, top_k=3),
    Draw(temperature=0.5, top_p=0.5, min_p=0.1),
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_invalidate_their_row_alone(host_library: MakeHostLibrary, bad: float) -> None:
    logits = make_logits("peaked", 2 * len(DRAWS), 403, torch.float32, 1)
    logits[1::2, 402] = bad
    slots, draws = np.arange(2 * len(DRAWS), dtype=np.int32), [draw for draw in DRAWS for _ in range(2)]

    found = draw_on_device(make_sampler(host_library(torch.float32), 403), logits, slots, draws, 0)

    assert found.valid == [True, False] * len(DRAWS)
    assert all(0 <= token < 403 for token in found.tokens)


def test_nothing_left_to_draw_is_no_valid_draw(host_library: MakeHostLibrary) -> None:
    sampler = make_sampler(host_library(torch.float32), 403)
    for slot in range(len(DRAWS)):
        sampler.occupy(
            SlotSetup(
                slot=slot,
                prompt_token_ids=NONE,
                output_token_ids=NONE,
                allowed_token_ids=(3, 9),
                stop_token_ids=(9, 3),
            )
        )
    logits, slots = make_logits("peaked", len(DRAWS), 403, torch.float32, 1), np.arange(len(DRAWS), dtype=np.int32)
    banning = [replace(draw, ban_stops=True) for draw in DRAWS]

    assert draw_on_device(sampler, logits, slots, banning, 0).valid == [False] * len(DRAWS)
    assert set(draw_on_device(sampler, logits, slots, DRAWS, 0).tokens) <= {3, 9}


def test_a_drawn_token_is_counted_until_the_slot_changes_its_occupant(host_library: MakeHostLibrary) -> None:
    logits = torch.zeros(1, 403)
    logits[0, [100, 200]] = torch.tensor([1.5, 1.0])
    sampler, slots = make_sampler(host_library(torch.float32), 403), np.array([NUM_SLOTS - 1], np.int32)
    setup = SlotSetup(slot=NUM_SLOTS - 1, prompt_token_ids=NONE, output_token_ids=NONE, uses_penalties=True)
    draws = [Draw(frequency_penalty=0.4)]
    sampler.occupy(setup)

    first = [draw_on_device(sampler, logits, slots, draws, position).tokens[0] for position in range(4)]
    sampler.occupy(setup)
    second = [draw_on_device(sampler, logits, slots, draws, position).tokens[0] for position in range(4)]

    assert first == second == [100, 100, 200, 100]  # 1.5 > 1.0, 1.1 > 1.0, 0.7 < 1.0, 0.7 > 0.6


@pytest.mark.parametrize("kind", ["flat", "equal"])
@pytest.mark.parametrize("edge", EDGES)
def test_exactly_the_tokens_are_kept_that_the_torch_sampler_keeps(
    host_library: MakeHostLibrary, edge: str, kind: str
) -> None:
    """Forty tokens a thread, and a list of a thirtieth of the vocabulary."""
    steps = [make_logits(kind, NUM_SLOTS, 2000, torch.float32, 1)]
    device = make_sampler(host_library(torch.float32), 2000, block=32, capacity=64)

    compare(device, Sampler(vocab_size=2000, device=CPU), make_edge_batch(edge, NUM_SLOTS), steps)


@pytest.mark.parametrize(("tokens", "apart"), [(1000, 1024), (403, 448)])
def test_rows_that_lie_apart_draw_what_rows_beside_each_other_draw(
    host_library: MakeHostLibrary, tokens: int, apart: int
) -> None:
    """Adapters may add tokens: rows, counts and bitmaps have room for them; a step without any draws over its own columns."""
    library, batch = host_library(torch.bfloat16), make_batch(ROWS, tokens, seed=8)
    logits = make_logits("peaked", ROWS, tokens, torch.bfloat16, 6)
    wide = torch.full((ROWS, apart), 1e30).to(torch.bfloat16)
    wide[:, :tokens] = logits
    samplers = make_sampler(library, tokens), make_sampler(library, apart)
    for sampler in samplers:
        for setup in batch.setups:
            sampler.occupy(setup)

    found = [
        [draw_on_device(sampler, rows, batch.slots, batch.draws, position, batch.masks(CPU)) for position in range(2)]
        for sampler, rows in zip(samplers, (logits, wide[:, :tokens]), strict=True)
    ]

    for own, other in zip(*found, strict=True):
        assert (own.tokens, own.outcomes) == (other.tokens, other.outcomes)
        assert {row: entry.logprobs.tolist() for row, entry in own.logprobs.items()} == {
            row: entry.logprobs.tolist() for row, entry in other.logprobs.items()
        }


def test_rows_at_another_distance_than_the_kernel_was_made_for_are_refused(host_library: MakeHostLibrary) -> None:
    sampler = make_sampler(host_library(torch.float32), 448)

    with pytest.raises(ValueError, match=r"logits: expected contiguous .*\[3, 448\]"):
        draw_on_device(sampler, torch.zeros(3, 403), np.arange(3, dtype=np.int32), [Draw()] * 3, 0)
