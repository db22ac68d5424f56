"""Ranks that divide both factors of an adapter draw what one rank draws, and divide where their rates say that it is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_engine.rank_split import CPU_RATES, PairSplit, RankRates, choice_of, choice_text
from loraplex_engine.runners.torch import divided
from support.base_models import TinyBase, write_base_model
from support.decoder_shapes import PROJECTIONS, pair_tensors
from support.plans import Draw
from support.rank_rig import load_on_ranks, make_ranked_rig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support.oracle import Rig

RANKS = (1, 3, 17)
NUM_LAYERS = 2
NUM_TOKENS = 5
BALANCED = RankRates(link_bytes_per_s=1e15, latency_s=5e-6, read_bytes_per_s=1e9, flops_per_s=1e15)
"""A collective takes as long as reading 5,000 bytes, whatever it moves."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("model"), TinyBase(num_layers=NUM_LAYERS))


def load_mixed(rig: Rig, ranks: Sequence[int] = RANKS) -> list[int]:
    """Load an adapter of each rank on all projections of all layers, and one more on some."""
    geometry: Any = rig.runner.geometry
    indices = []
    for seed, rank in enumerate((*ranks, 8)):
        names = PROJECTIONS if seed < len(ranks) else ("k_proj", "o_proj")
        modules = tuple(ModuleSpec.low_rank(layer, name, rank, 2.0) for layer in range(NUM_LAYERS) for name in names)
        rng, tensors = np.random.default_rng(seed), {}
        for module in modules:
            inputs, outputs = geometry.projection(module.layer, module.projection).shape
            a, b = rng.standard_normal((rank, inputs)) / 8, rng.standard_normal((outputs, rank)) / 8
            tensors[module.layer, module.projection] = a.astype(np.float32), b.astype(np.float32)
        indices.append(load_on_ranks(rig, AdapterSpec(f"{seed:064x}", modules), pair_tensors(tensors)))
    return indices


class Counted:
    """Counts a rank's collectives.

    Args:
        rig: A group.
    """

    def __init__(self, rig: Rig) -> None:
        ranked: Any = rig.runner
        self._group = ranked.runner._group
        self.num_gathers = self.num_sums = 0
        self._gather, self._sum = self._group.all_gather, self._group.all_reduce
        self._group.all_gather, self._group.all_reduce = self._count_gather, self._count_sum

    def _count_gather(self, values: Any, gathered: Any) -> None:
        self.num_gathers += 1
        self._gather(values, gathered)

    def _count_sum(self, values: Any) -> None:
        self.num_sums += 1
        self._sum(values)


def drawn_by(rig: Rig, adapters: Sequence[int]) -> list[tuple[list[int], list[float]]]:
    """Return tokens and log probabilities of prompts with each adapter, with two at once, and with none."""
    rng = np.random.default_rng(5)
    rows: list[tuple[int, float, list[tuple[int, float]]]] = [(index, 0.5, []) for index in adapters] + [
        (adapters[0], 1.5, [(adapters[2], -0.75)]),
        (-1, 1.0, []),
    ]
    sequences = [
        rig.harness.add(
            rng.integers(0, 380, 7).tolist(), adapter=index, scale=scale, more=more, draw=Draw(num_logprobs=0)
        )
        for index, scale, more in rows
    ]
    rig.harness.generate(sequences, NUM_TOKENS)
    return [(each.drawn, [float(token.logprobs[0]) for token in each.logprobs]) for each in sequences]


@pytest.mark.parametrize("degree", [2, 4])
def test_divided_factors_of_any_mix_of_adapters_give_what_whole_ones_give(model: Path, degree: int) -> None:
    found, counts = [], []
    for split in PairSplit:
        rig = make_ranked_rig(model, degree, num_pages=800, pair_split=split)
        adapters, counted = load_mixed(rig), Counted(rig)

        found.append(drawn_by(rig, adapters))

        counts.append((counted.num_gathers, counted.num_sums))
        rig.runner.close()
    whole, divided_ = found
    assert [tokens for tokens, _ in divided_] == [tokens for tokens, _ in whole]
    for (_, one), (_, other) in zip(whole, divided_, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert len({tuple(tokens) for tokens, _ in whole}) > len(RANKS), "adapters change what is drawn"
    (whole_gathers, whole_sums), (divided_gathers, divided_sums) = counts
    assert whole_gathers == 0
    assert divided_gathers == NUM_TOKENS * NUM_LAYERS * 2, "one for q, k and v, and one for gate and up, in each layer"
    assert divided_sums == whole_sums + NUM_TOKENS * NUM_LAYERS * 2, "one for o, and one for down"


def test_steps_without_adapters_send_nothing_more(model: Path) -> None:
    rig = make_ranked_rig(model, 2, pair_split=PairSplit.DIVIDED)
    load_mixed(rig)
    counted = Counted(rig)

    sequence = rig.harness.add([1, 2, 3])
    rig.harness.generate([sequence], NUM_TOKENS)

    assert counted.num_gathers == 0
    assert counted.num_sums == NUM_TOKENS * (1 + 2 * NUM_LAYERS)
    rig.runner.close()


def test_each_projection_of_a_step_is_divided_where_its_rates_say_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(divided._log, "info", lambda event, **fields: said.append({"event": event, **fields}))
    rig = make_ranked_rig(model, 2, num_pages=800, pair_split=BALANCED)
    small, _, large, _ = load_mixed(rig)

    for index in (small, large, small):
        sequence = rig.harness.add([1, 2, 3], adapter=index)
        rig.harness.generate([sequence], NUM_TOKENS)
        rig.harness.release([sequence])
    ranked: Any = rig.runner
    counts = dict(ranked.runner.pair_splits)
    rig.runner.close()

    assert counts == {
        PairSplit.WHOLE: NUM_TOKENS * NUM_LAYERS * (2 * 4 + 3),
        PairSplit.DIVIDED: NUM_TOKENS * NUM_LAYERS,
    }
    chosen = [(each["projection"], each["split"]) for each in said]
    assert chosen == [
        *((op, "whole") for op in ("qkv", "o", "gate_up", "down")),
        ("qkv", "divided"),  # of 51 stacked rank rows of 64 columns in fp32, half is more than 5,000 bytes
    ]
    assert said[-1]["factor_bytes"] == 3 * 17 * 64 * 4
    assert said[-1]["whole_us"] == pytest.approx(13.1)


def test_choices_survive_the_way_to_another_rank() -> None:
    for choice in (*PairSplit, CPU_RATES, BALANCED):
        assert choice_of(choice_text(choice)) == choice
