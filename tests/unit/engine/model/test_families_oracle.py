"""Dense families that are not Llama's, with mixed adapters, compute what transformers and peft compute in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.engine_harness import torch_engine
from support.families import FAMILIES, VOCAB_SIZE, family_dir, write_family_adapter
from support.oracle import Comparison, Oracle, adapter_image, make_rig
from support.teacher_forcing import NUM_FORCED, add_sequences, compare

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [4, 300, 17, 9, 8, 250, 61, 2, 33, 7, 110, 5, 19, 360, 41, 28, 77, 3]
NUM_TOKENS = 20
OUTSIDE = ["lm_head", "embed_tokens"]


def adapters_of(folder: Path, name: str) -> dict[str, Path]:
    """Three adapters of mixed ranks: all projections, some of them, and all with embedding and lm_head."""
    info = load_base_model(family_dir(name))
    projections = [each.name for each in info.layers[0]]
    outside = [] if info.config.get("tie_word_embeddings") else OUTSIDE
    recipes = {"all": (projections, 5), "some": (projections[::2], 16), "outside": ([*outside, *projections], 3)}
    return {
        each: write_family_adapter(folder / each, name, targets, rank=rank, seed=rank)
        for each, (targets, rank) in recipes.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_with_adapters_of_every_projection_equals_transformers_and_peft(tmp_path: Path, name: str) -> None:
    adapters = adapters_of(tmp_path, name)
    oracle = Oracle(family_dir(name), adapters)
    check_runner(name, oracle, adapters)
    check_engine(name, oracle, adapters)


def check_runner(name: str, oracle: Oracle, adapters: dict[str, Path]) -> None:
    """Compare every position, teacher-forced, of sequences of all adapters in one batch."""
    rig = make_rig(family_dir(name), adapters, num_pages=1024, max_model_len=256)
    added = add_sequences(rig, oracle, np.random.default_rng(7), VOCAB_SIZE)
    tally = Comparison()

    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    compare(oracle, added, tally)
    tally.check()
    rig.runner.close()


def check_engine(name: str, oracle: Oracle, adapters: dict[str, Path]) -> None:
    """Compare what a small engine draws: in chunks, with blocks of earlier requests, preempted."""
    info = load_base_model(family_dir(name))
    num_pages = engine_pages(name, adapters)
    with torch_engine(
        family_dir(name), num_pages=num_pages, block_tokens=4, num_arena_slots=4000, max_num_batched_tokens=24
    ) as harness:
        digests: dict[str | None, str | None] = {None: None}
        for each, directory in adapters.items():
            spec, image = adapter_image(harness.engine.geometry, info, directory, family_dir(name))
            harness.images[spec.digest] = (spec, image)
            digests[each] = spec.digest
        first = harness.submit(PROMPT, adapter=digests["all"], max_new_tokens=2)
        harness.wait([first])
        jobs = [(each, PROMPT[: len(PROMPT) - cut]) for cut in (0, 1, 5) for each in ("all", "all", None, "some")]
        asked = [harness.submit(prompt, adapter=digests[each], max_new_tokens=NUM_TOKENS) for each, prompt in jobs]
        harness.wait(asked)

        tally = Comparison()
        for (adapter, prompt), generation in zip(jobs, asked, strict=True):
            assert len(generation.tokens) == NUM_TOKENS, generation.end
            truth = oracle.logits([*prompt, *generation.tokens], adapter)
            for step, token in enumerate(generation.tokens):
                tally.choice(f"{adapter} step {step}", truth[len(prompt) - 1 + step], token)
        tally.check()
        assert any(each.start is not None and each.start.cached_tokens for each in asked)
        assert harness.engine.counters.num_preemptions > 0, "the case is too easy"


def engine_pages(name: str, adapters: dict[str, Path]) -> int:
    """Return pages for two of the adapters and a few sequences."""
    info = load_base_model(family_dir(name))
    pool = replace(choose_pool_geometry(info, dtype="float32"), block_tokens=4)
    geometry = info.geometry(dtype="float32", page_bytes=pool.page_bytes)
    sizes = [len(adapter_image(geometry, info, each, family_dir(name))[1]) for each in adapters.values()]
    return sizes[0] + sizes[1] + 48
