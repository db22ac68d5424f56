"""Tensor-parallel ranks compute what transformers and peft compute alone: adapters of every kind, shared heads, any vocabulary."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_common.base_model import BaseModelError
from loraplex_engine.model.vocabulary import Vocabulary
from loraplex_engine.rank_split import PairSplit
from loraplex_engine.ranks.gloo import GlooGroup
from support.base_models import Architecture, TinyBase, write_base_model
from support.families import family_dir
from support.oracle import Comparison, make_rig
from support.peft_parts import TUNERS, PeftTruth
from support.plans import Draw
from support.rank_rig import load_on_ranks, make_ranked_rig
from support.teacher_forcing import NUM_FORCED, add_sequences, compare
from torch._C._distributed_c10d import HashStore

if TYPE_CHECKING:
    from support.oracle import Rig

VOCAB_SIZE = 385


def load_all(rig: Rig, truth: PeftTruth) -> None:
    for name, tuned in truth.tuned.items():
        rig.adapters[name] = load_on_ranks(rig, tuned.spec, tuned.tensors)


def check_batch(rig: Rig, truth: PeftTruth, seed: int) -> None:
    """Run a batch of the base and all adapters, teacher-forced, and compare every position."""
    added = add_sequences(rig, truth, np.random.default_rng(seed), VOCAB_SIZE)
    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)
    tally = Comparison()
    compare(truth, added, tally)
    tally.check()
    rig.harness.release(sequence for _, sequence in added)


@settings(max_examples=2, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.sampled_from(["llama", "qwen2", "qwen3"]),
    degree=st.sampled_from([2, 4]),
    tuners=st.lists(st.sampled_from(TUNERS), min_size=2, max_size=4, unique=True),
    pair_split=st.sampled_from(PairSplit),
    seed=st.integers(0, 1 << 20),
)
def test_any_mix_of_tuners_equals_peft(
    architecture: Architecture, degree: int, tuners: list[str], pair_split: PairSplit, seed: int
) -> None:
    base = TinyBase(architecture=architecture, vocab_size=VOCAB_SIZE, seed=seed % 1000)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_base_model(Path(folder), base)
        truth = PeftTruth(model_dir, tuners, seed=seed)
        rig = make_ranked_rig(model_dir, degree, num_pages=1500, pair_split=pair_split)
        load_all(rig, truth)

        check_batch(rig, truth, seed)

        rig.runner.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases and fewer heads of keys than there are ranks."""
    return write_base_model(tmp_path_factory.mktemp("qwen"), TinyBase(architecture="qwen2", vocab_size=VOCAB_SIZE))


@pytest.mark.parametrize("pair_split", list(PairSplit))
@pytest.mark.parametrize("degree", [2, 4])
def test_each_tuner_equals_peft_where_four_ranks_share_two_heads_of_keys(
    qwen: Path, degree: int, pair_split: PairSplit
) -> None:
    truth, rig = PeftTruth(qwen, list(TUNERS)), make_ranked_rig(qwen, degree, num_pages=4000, pair_split=pair_split)
    load_all(rig, truth)

    check_batch(rig, truth, 1)

    assert rig.runner.weight_norms == pytest.approx(make_rig(qwen).runner.weight_norms, rel=1e-5)
    rig.runner.close()


@pytest.mark.parametrize("family", ["phi3", "gemma2", "granite4"])
def test_every_family_draws_what_one_rank_draws(family: str) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 300, length).tolist() for length in (1, 5, 23)]
    drawn = []
    for rig in (make_rig(family_dir(family)), make_ranked_rig(family_dir(family), 2)):
        sequences = [rig.harness.add(prompt, draw=Draw(num_logprobs=0)) for prompt in prompts]
        rig.harness.generate(sequences, 6)
        drawn.append([sequence.drawn for sequence in sequences])
        rig.runner.close()
    assert drawn[0] == drawn[1]


def test_a_family_that_ranks_cannot_compute_is_refused_by_name() -> None:
    with pytest.raises(BaseModelError, match="olmo2 normalises q and k over all heads at once"):
        make_ranked_rig(family_dir("olmo2"), 2)


@pytest.mark.parametrize("vocab_size", [2, 7, 385])
def test_any_vocabulary_is_divided(vocab_size: int) -> None:
    store = HashStore()
    table = torch.randn(vocab_size, 3)
    ids = torch.arange(vocab_size)

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        vocabulary = Vocabulary(vocab_size, GlooGroup(store, rank, 2))
        first, last = vocab_size * rank // 2, vocab_size * (rank + 1) // 2
        out = torch.empty(3, vocab_size).t()
        vocabulary.embed(table[first:last], ids, out)
        return out, vocabulary.gather(out @ table[first:last].t())

    with ThreadPoolExecutor(2) as ranks:
        (embedded, logits), (other, _) = ranks.map(run, range(2))
    assert torch.equal(embedded, table)
    assert torch.equal(other, table)
    torch.testing.assert_close(logits, table @ table.t())
