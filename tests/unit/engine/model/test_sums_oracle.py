"""Requests that add several adapters up, among all others in one batch, compute what peft's weighted sums compute."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import SchedulingPolicy
from loraplex_engine.messages import AdapterTerm
from support.adapters import Recipe, write_adapter
from support.base_models import Architecture, TinyBase, write_base_model
from support.engine_harness import EngineHarness, recipe_adapter, torch_engine
from support.oracle import Comparison, Oracle, make_rig
from support.peft_parts import PeftTruth
from support.teacher_forcing import NUM_FORCED, Sums, add_sequences, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.engine_harness import Generation

VOCAB_SIZE = 384
ADDITIVE = ["lora", "lora_bias", "shira"]
NUM_TOKENS = 12


@settings(max_examples=6, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.sampled_from(["llama", "qwen2", "qwen3"]),
    tuners=st.lists(st.sampled_from(ADDITIVE), min_size=3, max_size=4),
    lists=st.lists(
        st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0, 1.5])),
            min_size=2,
            max_size=3,
            unique_by=lambda term: term[0],
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 1 << 20),
)
def test_any_lists_of_any_additive_tuners_equal_the_merged_weights_before_and_after_a_reload(
    architecture: Architecture, tuners: list[str], lists: list[list[tuple[int, float]]], seed: int
) -> None:
    base = TinyBase(architecture=architecture, vocab_size=VOCAB_SIZE, seed=seed % 1000)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_base_model(Path(folder), base)
        truth, rig = PeftTruth(model_dir, [*tuners, "dora"], seed=seed), make_rig(model_dir, num_pages=2000)
        names = list(truth.tuned)
        sums: Sums = {f"sum-{at}": [(names[i], weight) for i, weight in terms] for at, terms in enumerate(lists)}
        for name, terms in sums.items():
            truth.add_sum(name, terms)

        for _ in range(2):
            for name, tuned in truth.tuned.items():
                rig.adapters[name] = rig.harness.load(tuned.spec, pack(rig.runner.geometry, tuned.spec, tuned.tensors))
            added = add_sequences(rig, truth, np.random.default_rng(seed), VOCAB_SIZE, sums)
            rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)
            tally = Comparison()
            compare(truth, added, tally)
            tally.check()
            rig.harness.release(sequence for _, sequence in added)
            for name in names:
                rig.runner.unload_adapter(rig.adapters.pop(name))
        rig.runner.close()


RECIPES = {
    "a" * 64: Recipe(rank=4, seed=1),
    "b" * 64: Recipe(rank=7, alpha=9, seed=2, targets=("q_proj", "v_proj", "down_proj")),
    "c" * 64: Recipe(rank=16, seed=3, use_rslora=True, targets=("o_proj", "gate_proj", "v_proj")),
}
MIXES = {
    "ab": [("a", 1.0), ("b", 0.5)],
    "ba": [("b", 0.5), ("a", 1.0)],
    "abc": [("a", 0.5), ("b", 1.0), ("c", 0.75)],
    "ac": [("a", 0.0), ("c", 1.0)],
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("sums"), TinyBase())


@pytest.fixture(scope="module")
def oracle(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Peft with its own weighted sums beside the adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    oracle = Oracle(base_dir, {d[0]: write_adapter(folder / d[0], base_dir, recipe) for d, recipe in RECIPES.items()})
    model: Any = oracle.model
    for mix, terms in MIXES.items():
        names, weights = zip(*terms, strict=True)
        model.add_weighted_adapter(list(names), list(weights), mix, combination_type="cat")
    return oracle


@pytest.fixture(params=[80, 256], ids=["tight", "roomy"])
def engine(base_dir: Path, request: pytest.FixtureRequest) -> Iterator[EngineHarness]:
    policy = SchedulingPolicy(growth_quantile=0.0)
    with torch_engine(
        base_dir, num_pages=request.param, block_tokens=4, max_num_batched_tokens=24, policy=policy
    ) as harness:
        for digest, recipe in RECIPES.items():
            harness.add_adapter(*recipe_adapter(load_base_model(base_dir), recipe, digest))
        yield harness
        harness.check_idle()


def submit(engine: EngineHarness, prompt: list[int], terms: list[tuple[str, float]]) -> Generation:
    (first, scale), *more = terms
    return engine.submit(
        prompt,
        adapter=first * 64,
        adapter_scale=scale,
        more_adapters=tuple(AdapterTerm(name * 64, weight) for name, weight in more),
        max_new_tokens=NUM_TOKENS,
    )


def test_a_whole_engine_gives_pefts_tokens_to_lists_beside_strangers_and_alone(
    engine: EngineHarness, oracle: Oracle
) -> None:
    rng = np.random.default_rng(7)
    mixes = MIXES | {name: [(name, 1.0)] for name in "abc"}
    cases = [(name, rng.integers(10, 200, int(rng.integers(3, 50))).tolist()) for name in list(mixes) * 2]

    together = [submit(engine, prompt, mixes[name]) for name, prompt in cases]
    base = [engine.submit(prompt, max_new_tokens=NUM_TOKENS) for _, prompt in cases]
    engine.wait([*together, *base])
    alone = []
    for name, prompt in cases:
        alone.append(submit(engine, [*prompt[:-1], prompt[-1]], mixes[name]))
        engine.wait(alone[-1:])

    expected = [oracle.greedy(prompt, NUM_TOKENS, name) for name, prompt in cases]
    assert [each.tokens for each in together] == expected
    assert [each.tokens for each in alone] == expected
    assert [each.tokens for each in base] == [oracle.greedy(prompt, NUM_TOKENS) for _, prompt in cases]
    if engine.engine.limits.num_pages < 100:
        assert engine.engine.counters.num_preemptions > 0, "the pool is meant to be too small"
        assert any(e.state.value == "in_arena" and e.generation > 0 for e in residency(engine)), "none was evicted"


def residency(engine: EngineHarness) -> list[Any]:
    return [event for event in engine.store_events if hasattr(event, "generation")]
