"""Adapters of every kind, mixed in one batch, compute what peft computes with each of them alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_common.adapter_image import pack
from support.base_models import Architecture, TinyBase, write_base_model
from support.oracle import Comparison, make_rig
from support.peft_parts import TUNERS, PeftTruth
from support.teacher_forcing import NUM_FORCED, add_sequences, compare

if TYPE_CHECKING:
    from support.oracle import Rig

VOCAB_SIZE = 384


def load_all(rig: Rig, truth: PeftTruth) -> None:
    for name, tuned in truth.tuned.items():
        rig.adapters[name] = rig.harness.load(tuned.spec, pack(rig.runner.geometry, tuned.spec, tuned.tensors))


def check_batch(rig: Rig, truth: PeftTruth, seed: int) -> None:
    """Run a batch of the base and all adapters, teacher-forced, and compare every position."""
    added = add_sequences(rig, truth, np.random.default_rng(seed), VOCAB_SIZE)
    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)
    tally = Comparison()
    compare(truth, added, tally)
    tally.check()
    rig.harness.release(sequence for _, sequence in added)


@settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.sampled_from(["llama", "qwen2", "qwen3"]),
    tuners=st.lists(st.sampled_from(TUNERS), min_size=2, max_size=4),
    seed=st.integers(0, 1 << 20),
)
def test_any_mix_of_tuners_equals_peft(architecture: Architecture, tuners: list[str], seed: int) -> None:
    base = TinyBase(architecture=architecture, vocab_size=VOCAB_SIZE, seed=seed % 1000)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_base_model(Path(folder), base)
        truth, rig = PeftTruth(model_dir, tuners, seed=seed), make_rig(model_dir, num_pages=1500)
        load_all(rig, truth)

        check_batch(rig, truth, seed)

        rig.runner.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("qwen"), TinyBase(architecture="qwen2", vocab_size=VOCAB_SIZE))


@pytest.mark.parametrize("tuner", TUNERS)
def test_each_tuner_changes_the_output_and_equals_peft_on_biased_projections(qwen: Path, tuner: str) -> None:
    truth, rig = PeftTruth(qwen, [tuner]), make_rig(qwen, num_pages=800)
    load_all(rig, truth)
    prompt = list(range(40, 70))

    check_batch(rig, truth, 1)

    (name,) = truth.tuned
    assert np.abs(truth.logits(prompt, name) - truth.logits(prompt)).max() > 0.1
    rig.runner.close()


def test_adapters_that_leave_the_pool_and_come_back_to_other_pages_equal_peft(qwen: Path) -> None:
    truth, rig = PeftTruth(qwen, TUNERS), make_rig(qwen, num_pages=1500)
    load_all(rig, truth)
    check_batch(rig, truth, 2)
    for name in truth.tuned:
        rig.runner.unload_adapter(rig.adapters.pop(name))

    load_all(rig, truth)

    check_batch(rig, truth, 3)
    rig.runner.close()
