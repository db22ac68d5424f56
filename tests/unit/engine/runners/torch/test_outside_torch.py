"""Steps of `TorchRunner` with adapters of the embedding and lm_head: what they leave alone, what they may draw, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors, pack
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.low_rank import LowRank
from loraplex_common.token_rows import Rows
from loraplex_common.vectors import OutVector
from loraplex_engine.step import SlotSetup
from support.base_models import TinyBase, write_base_model
from support.oracle import make_rig
from support.outside_adapters import OutsideTruth
from support.plans import Draw, Sequence_
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from support.oracle import Rig

VOCAB, HIDDEN, OUTSIDE = 384, 64, 2
NO_IDS = np.empty(0, np.int32)
SETUP = SlotSetup(slot=0, prompt_token_ids=NO_IDS, output_token_ids=NO_IDS)
PROMPTS = [list(range(10 + at, 30 + 3 * at)) for at in range(8)]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> OutsideTruth:
    return OutsideTruth(write_base_model(tmp_path_factory.mktemp("outside"), TinyBase()), ["plain", "lora", "saved"])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"), TinyBase())


@pytest.fixture
def rig(model_dir: Path, truth: OutsideTruth) -> Iterator[Rig]:
    rig = make_rig(model_dir, num_pages=1500)
    for name, adapter in truth.adapters.items():
        load(rig, name, adapter.spec, adapter.tensors)
    yield rig
    rig.runner.close()


def load(rig: Rig, name: str, spec: AdapterSpec, tensors: Tensors) -> None:
    rig.adapters[name] = rig.harness.load(spec, pack(rig.runner.geometry, spec, tensors))


def without_outside(spec: AdapterSpec, tensors: Tensors) -> tuple[AdapterSpec, Tensors]:
    """Return the same adapter of the decoder's layers alone."""
    modules = tuple(module for module in spec.modules if module.layer != OUTSIDE)
    return AdapterSpec(spec.digest, modules), {key: value for key, value in tensors.items() if key[0] != OUTSIDE}


def rows_adapter(embed: list[int], head: list[int], seed: int = 0) -> tuple[AdapterSpec, dict[Any, Any]]:
    """Return an adapter of nothing but random rows; lm_head's are loud."""
    rng, modules, tensors = np.random.default_rng(seed), [], {}
    for projection, ids, std in (("embed_tokens", embed, 1.0), ("lm_head", head, 2.0)):
        if ids:
            modules.append(ModuleSpec(OUTSIDE, projection, (Rows(len(ids), ids[-1]),)))
            values = (rng.standard_normal((len(ids), HIDDEN)) * std).astype(np.float32)
            tensors[OUTSIDE, projection, "rows"] = (np.array(ids, np.int32), values)
    return AdapterSpec(f"{seed + 77:064x}", tuple(modules)), tensors


def run(rig: Rig, adapters: list[str | None], num_tokens: int = 6, **draw: Any) -> list[Sequence_]:
    sequences = [
        rig.harness.add(prompt, adapter=rig.adapters[name], draw=Draw(num_logprobs=20, **draw))
        for prompt, name in zip(PROMPTS, adapters, strict=False)
    ]
    rig.harness.generate(sequences, num_tokens)
    return sequences


def bits(sequence: Sequence_) -> list[tuple[list[int], bytes]]:
    return [(entry.token_ids.tolist(), entry.logprobs.tobytes()) for entry in sequence.logprobs]


def test_rows_beside_such_adapters_are_bitwise_what_they_are_without(model_dir: Path, truth: OutsideTruth) -> None:
    names = [None, "plain-0", "saved-2", None, "lora-1", "plain-0", "saved-2", "lora-1"]
    found = []
    for is_stripped in (False, True):
        rig = make_rig(model_dir, num_pages=1500)
        for name, adapter in truth.adapters.items():
            spec, tensors = adapter.spec, adapter.tensors
            load(rig, name, *(without_outside(spec, tensors) if is_stripped else (spec, tensors)))
        # The tokens of the others do not matter, but the shapes of the steps do.
        found.append(run(rig, names, num_tokens=8))
        rig.runner.close()

    for name, one, other in zip(names, *found, strict=True):
        is_same = bits(one) == bits(other)
        assert is_same == (name in (None, "plain-0")), name


def test_alone_and_in_a_batch_of_strangers_they_draw_the_same(rig: Rig, truth: OutsideTruth) -> None:
    names = ["saved-2", None, "lora-1", "plain-0", "saved-2", None, "lora-1", "plain-0"]
    together = run(rig, names)

    for at, sequence in enumerate(together):
        alone = rig.harness.add(PROMPTS[at], adapter=rig.adapters[names[at]])
        rig.harness.generate([alone], 6)
        assert alone.drawn == sequence.drawn == truth.greedy(PROMPTS[at], 6, names[at])


def test_an_adapter_that_left_and_came_back_into_other_pages_draws_the_same(rig: Rig, truth: OutsideTruth) -> None:
    adapter, before = truth.adapters["saved-2"], run(rig, ["saved-2"])[0].drawn
    rig.runner.unload_adapter(rig.adapters["saved-2"])

    load(rig, "again", adapter.spec, adapter.tensors)

    assert run(rig, ["again"])[0].drawn == before
    assert set(before) & set(adapter.changed)


def test_requests_without_the_adapter_never_draw_its_tokens(rig: Rig) -> None:
    names = [None, "saved-2", "plain-0", "lora-1", None, "saved-2", "plain-0", "lora-1"]
    sequences = [
        rig.harness.add(prompt, adapter=rig.adapters[name], draw=Draw(temperature=2.0, seed=at))
        for at, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True))
    ]

    rig.harness.generate(sequences, 60)

    for name, sequence in zip(names, sequences, strict=True):
        assert (max(sequence.drawn) >= VOCAB) == (name == "saved-2"), name


def test_a_bias_an_allowed_id_a_penalty_and_a_mask_act_on_added_tokens(rig: Rig, truth: OutsideTruth) -> None:
    first, *_, last = truth.adapters["saved-2"].added
    index = rig.adapters["saved-2"]
    biased = rig.harness.add(PROMPTS[0], adapter=index, setup=replace(SETUP, logit_bias={first: 100.0}))
    allowed = rig.harness.add(PROMPTS[1], adapter=index, setup=replace(SETUP, allowed_token_ids=(last, 5)))
    penalised = rig.harness.add(
        PROMPTS[2],
        adapter=index,
        draw=Draw(frequency_penalty=2.0),
        setup=replace(SETUP, logit_bias={first: 60.0, last: 60.0}, uses_penalties=True),
    )
    base = rig.harness.add(PROMPTS[3], allowed=(4, 5))
    masked = rig.harness.add(PROMPTS[4], adapter=index, allowed=(last,))

    rig.harness.generate([biased, allowed, penalised, base, masked], 24)

    assert set(biased.drawn) == {first}
    assert set(allowed.drawn) <= {last, 5}
    assert set(penalised.drawn) == {first, last}
    assert set(base.drawn) <= {4, 5}
    assert set(masked.drawn) == {last}


def test_a_step_has_columns_for_added_tokens_only_if_an_adapter_in_it_has_some(rig: Rig) -> None:
    widths = []
    for name in (None, "lora-1", "saved-2"):
        sequence = rig.harness.add(PROMPTS[0], adapter=rig.adapters[name], allowed=(4, 5))
        plan = rig.harness.plan([sequence])
        handle = rig.runner.launch(plan)
        widths.append(handle.masks.shape[1])
        rig.harness.fill(handle.masks, plan, [sequence])
        handle.draw()
        handle.wait()

    assert widths == [12, 12, 20]  # 384 and 384 + 256 tokens


def test_an_id_that_the_rows_adapter_lacks_ends_its_request_alone(rig: Rig) -> None:
    load(rig, "gap", *rows_adapter([7, VOCAB + 1, VOCAB + 5], [VOCAB + 5]))
    prompts = {
        "gap": [3, 4, VOCAB + 5],
        "gap with a hole": [3, VOCAB + 2, 4],
        "lora-1": [9, VOCAB + 1],
        "base": [VOCAB],
    }
    sequences = {
        name: rig.harness.add(prompt, adapter=rig.adapters.get(name.removesuffix(" with a hole"), -1))
        for name, prompt in prompts.items()
    }
    stranger = rig.harness.add(PROMPTS[0])

    rig.harness.generate([*sequences.values(), stranger], 4)

    failures = {name: sequence.failure for name, sequence in sequences.items()}
    assert failures["gap"] is None
    assert stranger.failure is None
    assert "token id 386" in str(failures["gap with a hole"])
    assert "has no embedding for it" in str(failures["gap with a hole"])
    assert "token id 385" in str(failures["lora-1"])
    assert "no rows of tokens" in str(failures["base"])


def test_columns_of_a_gap_are_never_drawn(rig: Rig) -> None:
    load(rig, "gap", *rows_adapter([VOCAB + 1, VOCAB + 5], [VOCAB + 5]))
    sequences = [
        rig.harness.add(prompt, adapter=rig.adapters["gap"], draw=Draw(temperature=3.0, seed=at))
        for at, prompt in enumerate(PROMPTS)
    ]

    rig.harness.generate(sequences, 40)

    drawn = {token for sequence in sequences for token in sequence.drawn}
    assert {token for token in drawn if token >= VOCAB} == {VOCAB + 5}


def check(rig: Rig, *modules: ModuleSpec, is_activated: bool = False) -> None:
    rig.runner.check_adapter(AdapterSpec("f" * 64, modules, is_activated))


def test_what_is_not_computed_is_refused_by_name_with_the_remedy(rig: Rig) -> None:
    check(rig, ModuleSpec(OUTSIDE, "lm_head", (Rows(1, VOCAB + 255),)))
    with pytest.raises(AdapterIncompatibleError, match="start it with --max-added-tokens 257"):
        check(rig, ModuleSpec(OUTSIDE, "lm_head", (Rows(1, VOCAB + 256),)))
    with pytest.raises(AdapterIncompatibleError, match=r"lm_head: parts of kind 'out_vector'.*plain LoRA"):
        check(rig, ModuleSpec(OUTSIDE, "lm_head", (LowRank(2, 1.0), OutVector(is_magnitude=True))))
    with pytest.raises(AdapterIncompatibleError, match="embed_tokens: an activated adapter"):
        check(rig, ModuleSpec(OUTSIDE, "embed_tokens", (Rows(1, 3),)), is_activated=True)


@pytest.mark.parametrize(
    ("embed", "head", "said"),
    [
        ([VOCAB], [VOCAB, VOCAB + 1], "it can draw the added token 385, and has no embedding"),
        ([5, 3, 9], [], "not 3 rising ids up to 9"),
        ([-1, 9], [], "not 2 rising ids"),
    ],
)
def test_rows_that_make_no_sense_are_refused_and_bind_nothing(
    rig: Rig, embed: list[int], head: list[int], said: str
) -> None:
    spec, tensors = rows_adapter(embed, head)
    image: NDArray[np.uint8] = pack(rig.runner.geometry, spec, tensors)
    pages = np.array([rig.harness.free.pop() for _ in range(len(image))], dtype=np.int32)

    with pytest.raises(AdapterIncompatibleError, match=said):
        rig.runner.load_adapter(40, spec, pages, image)

    load(rig, "next", *rows_adapter([5], [VOCAB - 1], seed=3))
    assert run(rig, ["next", None])[1].failure is None


def test_the_answers_to_prompts_and_outputs_with_probabilities_name_added_tokens(rig: Rig, truth: OutsideTruth) -> None:
    last = truth.adapters["saved-2"].added[-1]
    prompt = [5, last, 9, last, 11]
    sequence = rig.harness.add(
        prompt, adapter=rig.adapters["saved-2"], chunks=[2, 1], setup=replace(SETUP, prompt_logprobs=3)
    )
    base = rig.harness.add([5, 6, 7], chunks=[2], setup=replace(SETUP, prompt_logprobs=3))

    rig.harness.generate([sequence, base], 2)

    expected = truth.logits(prompt, "saved-2").astype(np.float64)
    expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
    for at, entry in enumerate(sequence.prompt_logprobs):
        assert entry.token_ids[0] == prompt[at + 1]
        assert entry.token_ids[1:].tolist() == np.argsort(-expected[at])[:3].tolist()
        assert np.allclose(entry.logprobs, expected[at][entry.token_ids], atol=1e-4)
    assert len(base.prompt_logprobs) == 2
    assert all((entry.token_ids < VOCAB).all() for entry in base.prompt_logprobs)


def test_requests_own_factors_scale_pairs_outside_of_the_layers(rig: Rig, truth: OutsideTruth) -> None:
    scales = [0.5, 1.0, 2.0]
    sequences = [
        rig.harness.add(PROMPTS[at], adapter=rig.adapters["lora-1"], scale=scale, draw=Draw(num_logprobs=VOCAB))
        for at, scale in enumerate(scales)
    ]
    rig.harness.step(sequences)

    for at, scale in enumerate(scales):
        model = copy.deepcopy(truth.adapters["lora-1"].model)
        for module in model.modules():
            scaling: Any = getattr(module, "scaling", None)
            if isinstance(scaling, dict):
                scaling["default"] *= scale
        logits = model(torch.tensor([PROMPTS[at]])).logits[0, -1].detach()
        (entry,) = sequences[at].logprobs
        assert np.allclose(entry.logprobs[1:], logits.log_softmax(-1)[entry.token_ids[1:].astype(int)], atol=1e-4)


def test_a_step_in_flight_keeps_what_it_was_launched_with(model_dir: Path, truth: OutsideTruth) -> None:
    rig = make_rig(model_dir, num_pages=1500, emulate_async=True)
    adapter = truth.adapters["saved-2"]
    load(rig, "saved-2", adapter.spec, adapter.tensors)
    prompt = [5, adapter.added[-1], 9]
    sequence = rig.harness.add(prompt, adapter=rig.adapters["saved-2"])
    handle = rig.runner.launch(rig.harness.plan([sequence]))

    rig.runner.unload_adapter(rig.adapters["saved-2"])
    result = handle.wait()

    assert result.failed_slots == {}
    assert result.token_ids.tolist() == truth.greedy(prompt, 1, "saved-2")
    rig.runner.close()


def test_in_bf16_logits_are_those_of_fp32_but_for_rounding(model_dir: Path, truth: OutsideTruth) -> None:
    rig = make_rig(model_dir, num_pages=1500, dtype="bfloat16")
    names = ["lora-1", "saved-2"]
    for name in names:
        load(rig, name, truth.adapters[name].spec, truth.adapters[name].tensors)
    prompts = [[5, 6, 7], [5, truth.adapters["saved-2"].added[0], 7]]
    sequences = [
        rig.harness.add(prompt, adapter=rig.adapters[name], draw=Draw(num_logprobs=VOCAB))
        for prompt, name in zip(prompts, names, strict=True)
    ]
    rig.harness.step(sequences)

    for prompt, name, sequence in zip(prompts, names, sequences, strict=True):
        logits = torch.from_numpy(truth.logits(prompt, name)[-1])
        (entry,) = sequence.logprobs
        error = entry.logprobs[1:] - logits.log_softmax(-1)[entry.token_ids[1:].astype(int)].numpy()
        assert np.abs(error).max() < 0.05 * float(logits.abs().max())
    rig.runner.close()


def test_several_adapters_add_up_outside_of_the_layers_too(model_dir: Path) -> None:
    truth = OutsideTruth(model_dir, ["lora", "head lora", "embed lora", "plain"])
    rig = make_rig(model_dir, num_pages=1500)
    for name, adapter in truth.adapters.items():
        load(rig, name, adapter.spec, adapter.tensors)
    lists = [{"lora-0": 0.5, "head lora-1": 2.0}, {"embed lora-2": 1.0, "lora-0": 1.5, "plain-3": 0.7}, {"lora-0": 1.0}]
    sequences = []
    for prompt, weights in zip(PROMPTS, lists, strict=False):
        (first, scale), *more = [(rig.adapters[name], weight) for name, weight in weights.items()]
        draw = Draw(num_logprobs=VOCAB)
        sequences.append(rig.harness.add(prompt, adapter=first, scale=scale, more=more, draw=draw))
    rig.harness.step(sequences)

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for prompt, weights, sequence in zip(PROMPTS, lists, sequences, strict=False):
        summed = {key: value.clone() for key, value in base.state_dict().items()}
        for name, weight in weights.items():
            merged = copy.deepcopy(truth.adapters[name].model).merge_and_unload().state_dict()
            for key, value in base.state_dict().items():
                summed[key] += weight * (merged[key] - value)
        model = copy.deepcopy(base)
        model.load_state_dict(summed)
        logits = model(torch.tensor([prompt])).logits[0, -1].detach()
        (entry,) = sequence.logprobs
        assert np.allclose(entry.logprobs[1:], logits.log_softmax(-1)[entry.token_ids[1:].astype(int)], atol=2e-4)
    rig.runner.close()
