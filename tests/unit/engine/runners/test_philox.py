"""Philox4x32-10 gives Random123's numbers, and noise depends on seed, position and token alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loraplex_engine.runners.philox import Noise, gumbel, philox4x32

CPU = torch.device("cpu")
# kat_vectors of Random123: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)

    words = philox4x32((c0, c1, c2, c3), (k0, k1))

    assert tuple(int(word) for word in words) == expected


def test_a_row_s_noise_depends_on_its_seed_and_position_alone() -> None:
    seeds = np.array([3, 2**64 - 1, 3, 2**32 + 3], dtype=np.uint64)
    positions = np.array([7, 7, 8, 7], dtype=np.int32)

    together = Noise(seeds, positions, CPU).of_vocabulary(101)

    for row in range(4):
        alone = Noise(seeds[row : row + 1], positions[row : row + 1], CPU).of_vocabulary(101)
        assert torch.equal(alone[0], together[row])
    assert len({tuple(row.tolist()) for row in together}) == 4


def test_chosen_tokens_get_the_vocabulary_s_noise() -> None:
    noise = Noise(np.array([1, 2], dtype=np.uint64), np.array([0, 5], dtype=np.int32), CPU)
    tokens = torch.tensor([[0, 50, 3], [99, 98, 97]])

    assert torch.equal(noise.of_tokens(tokens), noise.of_vocabulary(100).gather(1, tokens))


def test_gumbel_noise_has_its_moments_and_no_infinities() -> None:
    words = Noise(np.array([9], dtype=np.uint64), np.array([0], dtype=np.int32), CPU).of_vocabulary(200_000)

    noise = gumbel(words)

    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.02
    extremes = gumbel(torch.tensor([0, 0xFFFFFFFF]))
    assert extremes.isfinite().all()
    assert float(extremes[0]) > 22
