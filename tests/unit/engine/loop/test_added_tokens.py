"""Adapters that add tokens, on a whole engine, against peft: cached, preempted, resumed, refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.structured_output import ConstraintKind
from loraplex_engine.constraints.banned_sequences import BannedSequences
from loraplex_engine.constraints.masks import GrammarMaskFiller
from loraplex_engine.constraints.output_rules import OutputRules
from loraplex_engine.messages import FinishReason, ResidencyChanged
from loraplex_engine.sampling_params import AddedTokenId, SamplingParams, StoppingParams
from support.base_models import TinyBase, write_base_model
from support.constraint_rig import PADDED_VOCAB_SIZE, compile_here, small_vocabulary
from support.engine_harness import EngineHarness, torch_engine
from support.outside_adapters import OutsideTruth

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.engine_harness import Generation

VOCAB, NUM_TOKENS = 384, 12
SAVED, LORA = "saved-0", "lora-1"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("added"), TinyBase())


@pytest.fixture(scope="module")
def truth(base_dir: Path) -> OutsideTruth:
    return OutsideTruth(base_dir, ["saved", "lora"])


@pytest.fixture
def engine(base_dir: Path, truth: OutsideTruth) -> Iterator[EngineHarness]:
    with torch_engine(base_dir, block_tokens=4) as harness:
        add_all(harness, truth)
        yield harness
        harness.check_idle()


def add_all(harness: EngineHarness, truth: OutsideTruth) -> None:
    for adapter in truth.adapters.values():
        harness.add_adapter(adapter.spec, adapter.tensors)


def digest(truth: OutsideTruth, name: str) -> str:
    return truth.adapters[name].spec.digest


def prompts(truth: OutsideTruth, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts with an added token in each."""
    rng, added = np.random.default_rng(seed), truth.adapters[SAVED].added
    made = [rng.integers(10, VOCAB, int(rng.integers(4, 30))).tolist() for _ in range(count)]
    for prompt in made:
        prompt[int(rng.integers(len(prompt)))] = int(rng.choice(added))
    return made


def refusal(generation: Generation) -> str:
    assert generation.end is not None
    assert generation.end.error is not None, generation
    return generation.end.error.message


def test_prompts_and_outputs_with_added_tokens_equal_pefts_beside_strangers(
    engine: EngineHarness, truth: OutsideTruth
) -> None:
    cases = prompts(truth, 6)
    plain = [[token % VOCAB for token in prompt] for prompt in cases]

    saved = [engine.submit(prompt, adapter=digest(truth, SAVED), max_new_tokens=NUM_TOKENS) for prompt in cases]
    lora = [engine.submit(prompt, adapter=digest(truth, LORA), max_new_tokens=NUM_TOKENS) for prompt in plain]
    base = [engine.submit(prompt, max_new_tokens=NUM_TOKENS) for prompt in plain]
    engine.wait([*saved, *lora, *base])

    assert [each.tokens for each in saved] == [truth.greedy(prompt, NUM_TOKENS, SAVED) for prompt in cases]
    assert [each.tokens for each in lora] == [truth.greedy(prompt, NUM_TOKENS, LORA) for prompt in plain]
    assert [each.tokens for each in base] == [truth.greedy(prompt, NUM_TOKENS) for prompt in plain]
    assert max(token for each in saved for token in each.tokens) >= VOCAB


def test_cached_blocks_are_found_by_added_tokens_and_only_by_the_same(
    engine: EngineHarness, truth: OutsideTruth
) -> None:
    first, second = truth.adapters[SAVED].added[:2]
    prompt = [*range(20, 25), first, *range(30, 42)]
    other = [second if token == first else token for token in prompt]
    engine.generate([prompt], adapter=digest(truth, SAVED), max_new_tokens=2)

    again = engine.submit(prompt, adapter=digest(truth, SAVED), max_new_tokens=NUM_TOKENS)
    different = engine.submit(other, adapter=digest(truth, SAVED), max_new_tokens=NUM_TOKENS)
    engine.wait([again, different])

    assert again.start is not None
    assert different.start is not None
    assert again.start.cached_tokens == 16
    assert different.start.cached_tokens == 4
    assert again.tokens == truth.greedy(prompt, NUM_TOKENS, SAVED)
    assert different.tokens == truth.greedy(other, NUM_TOKENS, SAVED)


def test_preempted_and_resumed_outputs_go_on_behind_added_tokens(base_dir: Path, truth: OutsideTruth) -> None:
    cases = prompts(truth, 6, seed=3)
    expected = [truth.greedy(prompt, 24, SAVED) for prompt in cases]
    assert max(token for tokens in expected for token in tokens[:8]) >= VOCAB

    def answers(num_pages: int, resumed: int) -> list[list[int]]:
        with torch_engine(base_dir, num_pages=num_pages, block_tokens=4) as harness:
            add_all(harness, truth)
            done = [
                harness.submit(
                    prompt,
                    adapter=digest(truth, SAVED),
                    max_new_tokens=24,
                    resumed_token_ids=np.array(tokens[:resumed], np.int32),
                )
                for prompt, tokens in zip(cases, expected, strict=True)
            ]
            harness.wait(done)
            assert harness.engine.counters.num_preemptions > 0
            return [each.tokens for each in done]

    num_pages = adapter_pages(base_dir, truth) + 48
    assert answers(num_pages, 0) == expected
    assert answers(num_pages, 8) == [tokens[8:] for tokens in expected]


def adapter_pages(base_dir: Path, truth: OutsideTruth) -> int:
    with torch_engine(base_dir, block_tokens=4) as harness:
        add_all(harness, truth)
        return len(harness.images[digest(truth, SAVED)][1])


def test_ids_that_the_adapter_lacks_are_refused_by_name_before_and_after_its_image_is_known(
    engine: EngineHarness, truth: OutsideTruth
) -> None:
    last = truth.adapters[SAVED].added[-1]
    wanted = {SAVED: last + 1, LORA: last}
    for _ in range(2):  # the second time, the image is here when the request arrives
        for name, token_id in wanted.items():
            refused = engine.submit(
                [5, 6], adapter=digest(truth, name), added_token_ids=(AddedTokenId("sampling.logit_bias", token_id),)
            )
            engine.wait([refused])

            assert f"sampling.logit_bias: token id {token_id}" in refusal(refused)
            assert digest(truth, name) in refusal(refused)
    accepted = engine.submit(
        [5, 6],
        adapter=digest(truth, SAVED),
        max_new_tokens=3,
        sampling=SamplingParams(temperature=0.0, logit_bias={last: 100.0}),
        added_token_ids=(AddedTokenId("sampling.logit_bias", last),),
    )
    engine.wait([accepted])
    assert accepted.tokens == [last] * 3


def test_a_scale_is_refused_of_rows_and_applied_to_pairs_outside_of_the_layers(
    engine: EngineHarness, truth: OutsideTruth
) -> None:
    refused = engine.submit([5, 6], adapter=digest(truth, SAVED), adapter_scale=0.5)
    none = engine.submit([5, 6, 7], adapter=digest(truth, LORA), adapter_scale=0.0, max_new_tokens=NUM_TOKENS)
    engine.wait([refused, none])

    assert "adapter_scale: 0.5 cannot be applied" in refusal(refused)
    assert none.tokens == truth.greedy([5, 6, 7], NUM_TOKENS) != truth.greedy([5, 6, 7], NUM_TOKENS, LORA)


def test_an_adapter_with_more_tokens_than_the_engine_takes_ends_its_requests_alone(
    base_dir: Path, truth: OutsideTruth
) -> None:
    with torch_engine(base_dir, max_added_tokens=2) as harness:
        add_all(harness, truth)
        refused = harness.submit([5, 6], adapter=digest(truth, SAVED))
        stranger = harness.submit([5, 6], adapter=digest(truth, LORA), max_new_tokens=4)
        harness.wait([refused, stranger])

        assert "start it with --max-added-tokens 3" in refusal(refused)
        assert stranger.tokens == truth.greedy([5, 6], 4, LORA)


def test_adapters_that_evict_each_other_draw_what_they_draw_alone(base_dir: Path, truth: OutsideTruth) -> None:
    cases = prompts(truth, 3, seed=8)
    with torch_engine(base_dir, num_pages=adapter_pages(base_dir, truth) + 24, block_tokens=4) as harness:
        add_all(harness, truth)
        for prompt in cases:
            plain = [token % VOCAB for token in prompt]
            (saved,) = harness.generate([prompt], adapter=digest(truth, SAVED), max_new_tokens=NUM_TOKENS)
            (lora,) = harness.generate([plain], adapter=digest(truth, LORA), max_new_tokens=NUM_TOKENS)

            assert saved == truth.greedy(prompt, NUM_TOKENS, SAVED)
            assert lora == truth.greedy(plain, NUM_TOKENS, LORA)
        states = {
            event.digest: event.generation for event in harness.store_events if isinstance(event, ResidencyChanged)
        }
        assert max(states.values()) > 1, "no adapter came back"


class VocabularyAtHand:
    """A `VocabularySource` that has been read."""

    def get(self) -> object:
        return small_vocabulary()


def test_structures_allow_no_added_token_but_a_stop_and_bad_words_may_name_them(tmp_path: Path) -> None:
    model_dir = write_base_model(tmp_path, TinyBase(vocab_size=PADDED_VOCAB_SIZE))
    truth = OutsideTruth(model_dir, ["saved"])
    adapter, (first, second, stop) = digest(truth, SAVED), truth.adapters[SAVED].added
    constraint = compile_here(ConstraintKind.REGEX, "a{2,9}")
    likely = SamplingParams(temperature=0.0, logit_bias={first: 100.0, second: 90.0, stop: 80.0})
    stopping = StoppingParams(max_new_tokens=8, ignore_eos=True)
    filler = GrammarMaskFiller(VocabularyAtHand(), num_threads=1)  # type: ignore[arg-type]
    with torch_engine(model_dir, block_tokens=4, filler=filler) as harness:
        add_all(harness, truth)
        ends = harness.submit(
            [5, 6],
            adapter=adapter,
            sampling=likely,
            stopping=StoppingParams(max_new_tokens=8, stop_token_ids=(stop,)),
            rules=OutputRules(constraint.start([]), eos_token_ids=(1,), stop_token_ids=(stop,)),
        )
        structured = harness.submit([5, 6], rules=OutputRules(constraint.start([]), eos_token_ids=(1,)))
        bad = harness.submit(
            [5, 6],
            adapter=adapter,
            sampling=likely,
            stopping=stopping,
            rules=OutputRules(None, BannedSequences([(first,)])),
        )
        harness.wait([ends, structured, bad])

    text = small_vocabulary().tokenizer.decode_str
    assert ends.end is not None
    assert (ends.end.finish_reason, ends.end.stop_token_id) == (FinishReason.STOP, stop)
    assert set(text(ends.tokens[:-1])) == {"a"}
    assert set(text([token for token in structured.tokens if token != 1])) == {"a"}
    assert bad.tokens == [second] * 8
