"""Dense families that are not Llama's, with mixed adapters, compute what transformers and peft compute in fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.errors import AdapterCorruptUploadError
from loraplex_engine.pool_geometry import choose_pool_geometry
from safetensors.torch import load_file, save
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
    """Three adapters of mixed ranks: all projections, some, and all with the embedding, and lm_head if that is another matrix."""
    info = load_base_model(family_dir(name))
    projections = [each.name for each in info.layers[0]]
    outside = OUTSIDE[1:] if info.tied_embeddings else OUTSIDE
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


@pytest.mark.parametrize("name", ["gemma2", "gemma3 untied"])
def test_rows_that_replace_those_of_a_scaled_embedding_equal_peft(tmp_path: Path, name: str) -> None:
    rows = [PROMPT[1], 9, 33]
    adapter = write_family_adapter(tmp_path, name, ["q_proj"], rank=2, seed=4, trainable_token_indices=rows)

    check_runner(name, Oracle(family_dir(name), {"rows": adapter}), {"rows": adapter})


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
    return sizes[0] + sizes[1] + 52


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [2.0] * 7}}, "long_factor has 7 numbers, expected 8"),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": None}}, "short_factor is null: expected a list"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not one of default, longrope"),
        ("granite", {"rope_parameters": LONGROPE}, "'longrope' is not one of default, linear"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0: expected a number greater than 0"),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 0.3}}, "expected an even part of a head of 24"),
        ("glm4", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25: expected no other one beside"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*expected 3 of 0 and 1"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not served: only gelu_pytorch_tanh is"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null: expected an integer"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not served"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0 is not served"),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 9.0}},
            "expected an object with full_attention and sliding_attention",
        ),
        ("gemma3", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling is .*expected none beside rope_parameters"),
        (
            "olmo3",
            {"layer_types": ["full_attention"]},
            "layer_types is .*expected 4 of sliding_attention and full_attention",
        ),
        ("ministral3", {"rope_parameters": None}, "rope_parameters is null: expected RoPE's parameters"),
        ("granite4", {"num_local_experts": 8}, "num_local_experts 8 is not served"),
        ("granite4", {"layer_types": ["mamba", "attention", "mamba"]}, "layer_types .* is not served"),
        ("granite4", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not served"),
        ("olmo2", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor 0.5 is not served"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_with_the_key(
    name: str, changes: dict[str, object], message: str
) -> None:
    config = json.loads((family_dir(name) / "config.json").read_text()) | changes

    with pytest.raises(BaseModelError, match=message):
        model_config(config)


def test_a_rotated_part_that_is_said_in_both_places_is_read() -> None:
    config = json.loads((family_dir("glm4") / "config.json").read_text())
    factor = config["rope_parameters"]["partial_rotary_factor"]

    read = model_config(config | {"partial_rotary_factor": factor})

    assert read == model_config(config)


@pytest.mark.parametrize(("kind", "rope"), [("rope", 0), ("nope", None), (None, None)])
def test_granite_4_has_rope_only_where_it_says_so(kind: str | None, rope: int | None) -> None:
    config = json.loads((family_dir("granite4") / "config.json").read_text())

    read = model_config(config | {"position_embedding_type": kind})

    assert [read.rope_of(layer) for layer in range(3)] == [rope] * 3


def test_the_trial_takes_a_fused_module_for_the_projections_that_it_is(tmp_path: Path) -> None:
    directory = write_family_adapter(tmp_path, "phi3", ["qkv_proj"], rank=4, seed=1)
    info = load_base_model(family_dir("phi3"))
    file = directory / "adapter_model.safetensors"
    # Queries and keys of 1e19 each are finite in fp32, as is their module's output; their scores are not.
    large = {name: weight * (1e20 if "lora_B" in name else 1) for name, weight in load_file(file).items()}

    with pytest.raises(AdapterCorruptUploadError, match="layer 0, qkv_proj: it makes values up to"):
        read_checkpoint((directory / "adapter_config.json").read_bytes(), save(large), info)
