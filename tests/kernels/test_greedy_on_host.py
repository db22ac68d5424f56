"""The kernel of greedy rows on the CPU, under sanitizers: what torch's likeliest token is, and what became of the draw."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from kernels.sampling_cases import KINDS, make_logits
from loraplex_engine.runners.sampled import outcomes_of
from loraplex_engine.runners.top_tokens import likeliest_tokens
from loraplex_kernels.sampling.greedy import Greedy

if TYPE_CHECKING:
    from kernels.conftest import MakeHostLibrary
    from kernels.host_kernels import HostLibrary

NAN, INFINITY = float("nan"), float("inf")
SLOTS = 9


def drawn(
    library: HostLibrary, logits: torch.Tensor, *, apart: int, shares: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and outcomes; the slots' tokens are those, and no other slot's is touched."""
    slots = torch.arange(len(logits), dtype=torch.int32).flip(0) + 1
    found, last = torch.full((2, len(logits)), -1, dtype=torch.int32), torch.full((SLOTS,), -7, dtype=torch.int32)

    Greedy(library, apart, shares=shares).launch(logits, slots, found, last)

    assert torch.equal(last[slots.long()], found[0])
    assert int((last == -7).sum()) == SLOTS - len(logits)
    return found[0], found[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "dtype"), [(5000, torch.bfloat16), (403, torch.float32)])
@pytest.mark.parametrize("shares", [1, 8])
def test_the_likeliest_token_is_drawn_the_lowest_id_among_equals(
    host_library: MakeHostLibrary, kind: str, vocab: int, dtype: torch.dtype, shares: int
) -> None:
    logits = make_logits(kind, 3, vocab, dtype, 7)

    tokens, outcomes = drawn(host_library(dtype), logits, apart=vocab, shares=shares)

    best, expected = likeliest_tokens(logits)
    assert tokens.tolist() == expected.tolist()
    assert outcomes.tolist() == outcomes_of(best).tolist()


def test_the_largest_may_be_any_token(host_library: MakeHostLibrary) -> None:
    """The first, the last, and those beside the borders of what threads and CTAs read."""
    places = [0, 7, 8, 2047, 2048, 16383, 16384, 16390]
    logits = torch.full((len(places), 16391), -3.0)
    for row, place in enumerate(places):
        logits[row, place] = -2.5

    assert drawn(host_library(torch.float32), logits, apart=16391)[0].tolist() == places


def test_rows_that_are_not_finite_are_marked_and_no_others(host_library: MakeHostLibrary) -> None:
    logits = torch.randn(8, 200)
    for row, (place, value) in enumerate(itertools.product((0, 130, 199), (NAN, INFINITY))):
        logits[row, place] = value
    logits[6] = -INFINITY

    tokens, outcomes = drawn(host_library(torch.float32), logits, apart=200)

    assert outcomes.tolist() == outcomes_of(logits.amax(1)).tolist() == [0, 0, 0, 0, 0, 0, 2, 1]
    assert tokens[:6].tolist() == [0, 0, 130, 130, 199, 199]
    assert int(tokens[7]) == int(logits[7].argmax())


def test_both_zeros_are_equal(host_library: MakeHostLibrary) -> None:
    logits = torch.full((1, 3000), -1.0)
    logits[0, 2900], logits[0, 12] = 0.0, -0.0

    assert drawn(host_library(torch.float32), logits, apart=3000)[0].tolist() == [12]


@pytest.mark.parametrize("rows", [1, 4])
def test_tokens_behind_the_last_column_are_not_drawn(host_library: MakeHostLibrary, rows: int) -> None:
    wide = torch.full((rows, 448), 1e30)
    wide[:, :403] = torch.randn(rows, 403)

    tokens, _ = drawn(host_library(torch.float32), wide[:, :403], apart=448)

    assert tokens.tolist() == wide[:, :403].argmax(1).tolist()


def test_rows_at_another_distance_than_the_kernel_was_made_for_are_refused(host_library: MakeHostLibrary) -> None:
    with pytest.raises(ValueError, match=r"logits: expected contiguous .*\[3, 448\]"):
        drawn(host_library(torch.float32), torch.zeros(3, 403), apart=448)
