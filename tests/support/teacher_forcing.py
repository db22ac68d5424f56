"""Sequences that are fed an oracle's tokens, and the comparison of every position with it (docs/testing.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from loraplex_engine.step import SlotSetup
from support.plans import Draw, Sequence_

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from support.oracle import Comparison, Rig

NUM_FORCED = 5


Sums = dict[str, list[tuple[str, float]]]
"""Adapters that are added up, by the sum's name: names and weights."""


class Truth(Protocol):
    """What results are compared with; see `support.oracle.Oracle`."""

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]: ...

    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None = None) -> list[int]: ...


def add_sequences(
    rig: Rig, oracle: Truth, rng: np.random.Generator, vocab_size: int, sums: Sums | None = None
) -> list[tuple[str | None, Sequence_]]:
    """Two sequences per adapter, per sum of several and for the base: prompts and chunks of any length, teacher-forced."""
    added = []
    lists = {name: [(index, 1.0)] for name, index in rig.adapters.items()}
    lists |= {name: [(rig.adapters[each], scale) for each, scale in terms] for name, terms in (sums or {}).items()}
    for name, ((index, scale), *more) in list(lists.items()) * 2:
        prompt = rng.integers(0, vocab_size, int(rng.integers(1, 45))).tolist()
        cuts = np.flatnonzero(rng.random(len(prompt) - 1) < 0.08) + 1
        sequence = rig.harness.add(
            prompt,
            adapter=index,
            scale=scale,
            more=more,
            forced=oracle.greedy(prompt, NUM_FORCED, name),
            chunks=np.diff([0, *cuts]).tolist(),
            draw=Draw(num_logprobs=vocab_size),
            setup=SlotSetup(
                slot=0,
                prompt_token_ids=np.empty(0, np.int32),
                output_token_ids=np.empty(0, np.int32),
                prompt_logprobs=vocab_size,
            ),
        )
        added.append((name, sequence))
    return added


def compare(oracle: Truth, added: list[tuple[str | None, Sequence_]], tally: Comparison) -> None:
    """Compare every position of every sequence with the oracle's."""
    for name, sequence in added:
        truth = oracle.logits([*sequence.prompt, *sequence.forced[:NUM_FORCED]], name)
        for position, entry in enumerate(sequence.prompt_logprobs):
            tally.logprobs(truth[position], entry)
        assert len(sequence.prompt_logprobs) == len(sequence.prompt) - 1
        for step, token in enumerate(sequence.drawn):
            tally.choice(f"{name} step {step}", truth[len(sequence.prompt) - 1 + step], token)
            tally.logprobs(truth[len(sequence.prompt) - 1 + step], sequence.logprobs[step])
