"""Activated LoRA on a whole engine, against peft: the adapter applies from the last invocation in the prompt on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError
from loraplex_engine.limits import SchedulingPolicy
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.engine_harness import EngineHarness, recipe_adapter, torch_engine
from support.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec

INVOCATION = (7, 9, 8)
ACTIVATED, PLAIN = "a" * 64, "b" * 64
NUM_TOKENS = 12
RECIPE = Recipe(rank=4, strength=1.5, seed=3)
WITHOUT_GROWTH = SchedulingPolicy(growth_quantile=0.0)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("activated"), TinyBase())


@pytest.fixture(scope="module")
def oracle(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("adapters")
    plain = write_adapter(folder / "plain", base_dir, RECIPE)
    activated = folder / "activated"
    shutil.copytree(plain, activated)
    config = json.loads((activated / "adapter_config.json").read_text())
    (activated / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": list(INVOCATION)}))
    return Oracle(base_dir, {"activated": activated, "plain": plain})


@pytest.fixture(scope="module")
def specs(base_dir: Path) -> dict[str, tuple[AdapterSpec, object]]:
    spec, tensors = recipe_adapter(load_base_model(base_dir), RECIPE, PLAIN)
    return {PLAIN: (spec, tensors), ACTIVATED: (replace(spec, digest=ACTIVATED, is_activated=True), tensors)}


@pytest.fixture
def engine(base_dir: Path, specs: dict[str, tuple[AdapterSpec, object]]) -> Iterator[EngineHarness]:
    with torch_engine(base_dir, max_num_batched_tokens=16, block_tokens=4, policy=WITHOUT_GROWTH) as harness:
        for spec, tensors in specs.values():
            harness.add_adapter(spec, tensors)  # type: ignore[arg-type]
        yield harness
        harness.check_idle()


def prompts(count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Return prompts with an invocation somewhere, and where the last one begins."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        before, after = rng.integers(0, 30), rng.integers(0, 12)
        head, tail = rng.integers(10, 64, before).tolist(), rng.integers(10, 64, after).tolist()
        if number % 3 == 0:
            head = [*INVOCATION, *head]  # an earlier one, which does not count
        made.append(([*head, *INVOCATION, *tail], len(head)))
    return made


def test_rows_equal_pefts_and_rows_beside_them_stay_as_they_are(engine: EngineHarness, oracle: Oracle) -> None:
    cases = prompts(12)

    activated = [
        engine.submit(prompt, adapter=ACTIVATED, adapter_start=start, max_new_tokens=NUM_TOKENS)
        for prompt, start in cases
    ]
    plain = [engine.submit(prompt, adapter=PLAIN, max_new_tokens=NUM_TOKENS) for prompt, _ in cases]
    base = [engine.submit(prompt, max_new_tokens=NUM_TOKENS) for prompt, _ in cases]
    engine.wait([*activated, *plain, *base])

    different = 0
    for (prompt, _), *found in zip(cases, activated, plain, base, strict=True):
        expected = [oracle.greedy(prompt, NUM_TOKENS, adapter) for adapter in ("activated", "plain", None)]
        assert [each.tokens for each in found] == expected
        different += len({tuple(tokens) for tokens in expected}) == 3
    assert different >= 6, "the three ways must tell each other apart"


def test_what_is_before_the_invocation_is_found_in_the_base_models_cache(engine: EngineHarness, oracle: Oracle) -> None:
    head = np.random.default_rng(5).integers(10, 64, 22).tolist()
    prompt = [*head, *INVOCATION, 11, 12]
    engine.generate([prompt], max_new_tokens=2)  # the base model's
    (expected,) = engine.generate([prompt], adapter=PLAIN, max_new_tokens=NUM_TOKENS)

    first = engine.submit(prompt, adapter=ACTIVATED, adapter_start=22, max_new_tokens=NUM_TOKENS)
    engine.wait([first])
    again = engine.submit([*prompt, 13], adapter=ACTIVATED, adapter_start=22, max_new_tokens=NUM_TOKENS)
    engine.wait([again])

    assert first.start is not None
    assert again.start is not None
    assert first.start.cached_tokens == 20, "5 whole blocks of 4 tokens before token 22; the next is the adapter's"
    assert again.start.cached_tokens == 24, "its own block, too"
    assert first.tokens == oracle.greedy(prompt, NUM_TOKENS, "activated") != expected
    assert again.tokens == oracle.greedy([*prompt, 13], NUM_TOKENS, "activated")


def test_preemption_and_resume_do_not_move_the_place(
    base_dir: Path, specs: dict[str, tuple[AdapterSpec, object]]
) -> None:
    cases = prompts(6, seed=2)

    def answers(num_pages: int, resumed: int) -> list[list[int]]:
        with torch_engine(base_dir, num_pages=num_pages, block_tokens=4, policy=WITHOUT_GROWTH) as harness:
            for spec, tensors in specs.values():
                harness.add_adapter(spec, tensors)  # type: ignore[arg-type]
            done = [
                harness.submit(
                    prompt,
                    adapter=ACTIVATED,
                    adapter_start=start,
                    max_new_tokens=24,
                    resumed_token_ids=np.array(INVOCATION[:resumed], np.int32),
                )
                for prompt, start in cases
            ]
            harness.wait(done)
            if num_pages < 100:
                assert harness.engine.counters.num_preemptions > 0
            return [each.tokens for each in done]

    pages = answers(256, 0)
    assert answers(48, 0) == pages
    assert answers(48, 3) == answers(256, 3), "an invocation among the outputs moves nothing"


def test_a_request_without_a_place_is_refused_and_one_with_a_place_too_many(engine: EngineHarness) -> None:
    without = engine.submit([1, *INVOCATION], adapter=ACTIVATED, max_new_tokens=2)
    too_many = engine.submit([1, *INVOCATION], adapter=PLAIN, adapter_start=1, max_new_tokens=2)
    engine.wait([without, too_many])

    assert without.end is not None
    assert too_many.end is not None
    assert isinstance(without.end.error, AdapterIncompatibleError)
    assert "update the gateway" in str(without.end.error)
    assert isinstance(too_many.end.error, InvalidParameterError)
