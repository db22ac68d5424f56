"""Structured outputs of a whole engine on the torch backend: valid, the same alone and in company, resumed and cached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_engine.constraints.compiler import Constraints, make_constraints
from loraplex_engine.messages import FinishReason
from loraplex_engine.sampling_params import SamplingParams
from support.base_models import TinyBase, write_base_model
from support.engine_harness import torch_engine
from support.structured import EOS, VOCAB_SIZE, WANTED, check_valid, jobs_of, submit_all
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("structured") / "tiny", TinyBase(vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def constraints(model_dir: Path) -> Constraints:
    return make_constraints(model_dir, vocab_size=VOCAB_SIZE, eos_token_ids=EOS, num_threads=2)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.mark.parametrize("is_async", [False, True])
def test_structured_outputs_are_valid_and_the_same_alone_and_in_company(
    model_dir: Path, constraints: Constraints, tokenizer: Tokenizer, *, is_async: bool
) -> None:
    jobs = jobs_of(32)
    with torch_engine(model_dir, eos_token_ids=EOS, filler=constraints.filler, emulate_async=is_async) as harness:
        together = harness.wait(submit_all(harness, constraints, jobs))
        alone = [harness.wait(submit_all(harness, constraints, [job]))[0] for job in jobs[::3]]
        harness.check_idle()

    assert [each.tokens for each in alone] == [each.tokens for each in together[::3]]
    assert check_valid(jobs, together, tokenizer) >= 16


def test_an_output_resumed_anywhere_goes_on_as_it_would_have(model_dir: Path, constraints: Constraints) -> None:
    job: dict[str, object] = {"wanted": WANTED[0], "sampling": SamplingParams(temperature=1.0, seed=5)}
    with torch_engine(model_dir, eos_token_ids=EOS, filler=constraints.filler) as harness:
        (whole,) = harness.wait(submit_all(harness, constraints, [job]))
        cuts = range(1, len(whole.tokens) - 1, 3)
        rest = harness.wait(submit_all(harness, constraints, [job | {"resumed": whole.tokens[:cut]} for cut in cuts]))

    assert len(list(cuts)) > 2
    assert [each.tokens for each in rest] == [whole.tokens[cut:] for cut in cuts]


def test_a_cached_prompt_changes_no_structured_output(model_dir: Path, constraints: Constraints) -> None:
    job = jobs_of(2)[0] | {"prompt": list(range(20, 60))}
    with torch_engine(model_dir, eos_token_ids=EOS, filler=constraints.filler, block_tokens=4) as harness:
        (first,) = harness.wait(submit_all(harness, constraints, [job]))
        (second,) = harness.wait(submit_all(harness, constraints, [job]))

    assert second.start is not None
    assert second.start.cached_tokens > 0
    assert first.tokens == second.tokens


def test_probabilities_are_those_among_the_tokens_that_the_mask_allows(
    model_dir: Path, constraints: Constraints
) -> None:
    job: dict[str, object] = {"wanted": WANTED[2], "sampling": SamplingParams(temperature=1.0, num_logprobs=20)}
    with torch_engine(model_dir, eos_token_ids=EOS, filler=constraints.filler) as harness:
        (generation,) = harness.wait(submit_all(harness, constraints, [job]))

    assert len(generation.logprobs) == len(generation.tokens)
    for (
        entry
    ) in generation.logprobs:  # few tokens begin with what is left of three choices, so 20 entries hold them all
        assert np.exp(entry.logprobs[1:].astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
        assert entry.logprobs[0] > -np.inf


def test_banned_sequences_hold_beside_a_structure(
    model_dir: Path, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    yes = [tokenizer.token_to_id(letter) for letter in "y"]
    jobs = [
        {"wanted": WANTED[2], "bans": ((yes[0],),), "sampling": SamplingParams(temperature=2.0, seed=seed)}
        for seed in range(12)
    ]
    with torch_engine(model_dir, eos_token_ids=EOS, filler=constraints.filler) as harness:
        found = harness.wait(submit_all(harness, constraints, jobs))

    texts = {tokenizer.decode(each.tokens, skip_special_tokens=True) for each in found}
    assert texts <= {"no", "perhaps"}
    assert all(each.end is not None and each.end.finish_reason is FinishReason.STOP for each in found)
