"""An engine with FP8 keys and values computes what transformers and peft compute over a cache that keeps e4m3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.base_model import load_base_model
from support.engine_harness import torch_engine
from support.families import VOCAB_SIZE, family_dir, write_family_adapter
from support.fp8_cache import Fp8Cache
from support.oracle import Comparison, Oracle, adapter_image, make_rig
from support.teacher_forcing import NUM_FORCED, add_sequences

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("gemma2", "phi3")
"""Score caps, two windows and heads of their own size; fused projections and a partial rotation."""


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    name = request.param
    projections = [each.name for each in load_base_model(family_dir(name)).layers[0]]
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {"all": write_family_adapter(folder / "all", name, projections, rank=5, seed=5)}
    return name, adapters


def test_any_chunks_compute_what_the_oracle_computes_over_e4m3(case: tuple[str, dict[str, Path]]) -> None:
    name, adapters = case
    plain, oracle = Oracle(family_dir(name), adapters), Oracle(family_dir(name), adapters, make_cache=Fp8Cache)
    rig = make_rig(family_dir(name), adapters, num_pages=512, max_model_len=256, kv_dtype="fp8")
    added = add_sequences(rig, oracle, np.random.default_rng(7), VOCAB_SIZE)

    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    own: list[float] = []
    other: list[float] = []
    for adapter, sequence in added:
        tokens = [*sequence.prompt, *sequence.forced[:NUM_FORCED]]
        for truth, errors in ((oracle.logits(tokens, adapter), own), (plain.logits(tokens, adapter), other)):
            for position, reported in enumerate([*sequence.prompt_logprobs, *sequence.logprobs]):
                row = Comparison()
                row.logprobs(truth[position], reported)
                errors.append(row.logit_error)
    rig.runner.close()
    assert np.median(own) < 1e-5, "all positions but those behind a rounding that a sum's last bit decides"
    assert max(own) < 1e-2
    assert np.median(other) > 5e-3, "without e4m3 the test would not fail"
    assert max(other) < 0.1


def test_blocks_are_shared_and_requests_preempted_with_e4m3(case: tuple[str, dict[str, Path]]) -> None:
    name, adapters = case
    prompt = [4, 300, 17, 9, 8, 250, 61, 2, 33, 7, 110, 5, 19, 360, 41, 28, 77, 3]
    oracle, info = Oracle(family_dir(name), adapters, make_cache=Fp8Cache), load_base_model(family_dir(name))
    with torch_engine(
        family_dir(name), num_pages=90, block_tokens=4, num_arena_slots=4000, max_num_batched_tokens=24, kv_dtype="fp8"
    ) as harness:
        spec, image = adapter_image(harness.engine.geometry, info, adapters["all"], family_dir(name))
        harness.images[spec.digest] = (spec, image)
        digests: dict[str | None, str | None] = {None: None, "all": spec.digest}
        first = harness.submit(prompt, adapter=spec.digest, max_new_tokens=2)
        harness.wait([first])
        jobs = [(each, prompt[: len(prompt) - cut]) for cut in (0, 1, 5) for each in ("all", "all", None, None)]
        asked = [harness.submit(each, adapter=digests[adapter], max_new_tokens=20) for adapter, each in jobs]
        harness.wait(asked)

        tally = Comparison()
        for (adapter, each), generation in zip(jobs, asked, strict=True):
            truth = oracle.logits([*each, *generation.tokens], adapter)
            for step, token in enumerate(generation.tokens):
                tally.choice(f"{adapter} step {step}", truth[len(each) - 1 + step], token)
        tally.check()
        assert harness.engine.counters.num_preemptions > 0, "the case is too easy"
        assert any(each.start is not None and each.start.cached_tokens for each in asked)
