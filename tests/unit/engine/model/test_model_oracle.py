"""Random models with random adapters compute what transformers + peft compute, in any batch and any chunking."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.step import SlotSetup
from support.adapters import random_recipe, write_adapter
from support.base_models import Architecture, TinyBase, write_base_model
from support.oracle import Comparison, Oracle, make_rig
from support.plans import Draw, Sequence_
from support.teacher_forcing import NUM_FORCED, add_sequences, compare

ROPES = (
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
)


@st.composite
def bases(draw: st.DrawFn) -> TinyBase:
    """Draw an architecture; all heads divide the hidden size, as transformers demands of Llama."""
    architecture: Architecture = draw(st.sampled_from(get_args(Architecture)))
    num_heads, num_kv_heads = draw(st.sampled_from([(4, 2), (4, 4), (6, 2), (8, 1)]))
    head_dim = draw(st.sampled_from([8, 16, 32]))
    free_head_dim = architecture in ("qwen3", "mistral") and draw(st.booleans())
    return TinyBase(
        architecture=architecture,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=96 if free_head_dim else num_heads * head_dim,
        intermediate_size=draw(st.sampled_from([72, 128])),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.sampled_from([384, 397])),
        rope_theta=draw(st.sampled_from([10000.0, 500000.0])),
        rope_scaling=draw(st.sampled_from(ROPES)),
        sliding_window=draw(st.sampled_from([None, 7, 24])) if architecture != "llama" else None,
        tie_word_embeddings=draw(st.booleans()),
        bias=draw(st.booleans()) if architecture in ("llama", "qwen3") else None,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        seed=draw(st.integers(0, 1000)),
        num_shards=draw(st.sampled_from([1, 2])),
    )


@settings(max_examples=14, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(base=bases(), seed=st.integers(0, 1 << 30))
def test_random_models_and_adapters_equal_transformers_and_peft(base: TinyBase, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_base_model(Path(folder) / "base", base)
        page_bytes = choose_pool_geometry(load_base_model(model_dir), dtype="float32").page_bytes
        max_rank = min(64, page_bytes // 96)  # a tile holds at least 8 columns of q, k and v's stacked ranks
        adapters = {
            name: write_adapter(Path(folder) / name, model_dir, random_recipe(rng, base.num_layers, max_rank=max_rank))
            for name in ("first", "second")
        }
        oracle = Oracle(model_dir, adapters)
        rig = make_rig(model_dir, adapters, num_pages=2048)
        added = add_sequences(rig, oracle, rng, base.vocab_size)
        tally = Comparison()

        rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

        compare(oracle, added, tally)
        tally.check()
        rig.runner.close()


def check_against_oracle(model_dir: Path, *, prompt_length: int = 60) -> None:
    """Compare every position of one long sequence on the base model."""
    oracle, rig = Oracle(model_dir), make_rig(model_dir)
    prompt = np.random.default_rng(0).integers(0, 384, prompt_length).tolist()
    asked = SlotSetup(
        slot=0, prompt_token_ids=np.empty(0, np.int32), output_token_ids=np.empty(0, np.int32), prompt_logprobs=384
    )
    sequence = rig.harness.add(
        prompt, forced=oracle.greedy(prompt, NUM_FORCED), chunks=[33], draw=Draw(num_logprobs=384), setup=asked
    )
    tally = Comparison()

    rig.harness.generate([sequence], NUM_FORCED + 1)

    compare(oracle, [(None, sequence)], tally)
    tally.check()
    rig.runner.close()


def edit_config(model_dir: Path, **changes: Any) -> Path:
    """Replace entries of config.json; None removes one."""
    file = model_dir / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({key: value for key, value in config.items() if key not in changes or value is not None})
    )
    return model_dir


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "plain" if rope is None else rope.get("rope_type", "dynamic"))
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_every_rope_rule_in_either_spelling_equals_transformers(
    tmp_path: Path, rope: dict[str, Any] | None, spelling: str
) -> None:
    model_dir = write_base_model(tmp_path, TinyBase(rope_scaling=rope, rope_theta=20000.0))
    if spelling == "rope_parameters":
        kind = rope.get("rope_type") or rope["type"] if rope else "default"
        parameters = {**(rope or {}), "rope_type": kind, "rope_theta": 20000.0}
        edit_config(model_dir, rope_theta=None, rope_scaling=None, rope_parameters=parameters)

    check_against_oracle(model_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"use_sliding_window": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_windows_of_some_layers_only_equal_transformers(
    tmp_path: Path, architecture: Literal["qwen2", "qwen3"], changes: dict[str, Any]
) -> None:
    base = TinyBase(architecture=architecture, num_layers=3, sliding_window=9)

    check_against_oracle(edit_config(write_base_model(tmp_path, base), **changes))


def tiny_world(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A model with grouped queries and a window, and three adapters that differ in everything."""
    rng = np.random.default_rng(5)
    base = TinyBase(architecture="mistral", num_layers=2, sliding_window=20)
    model_dir = write_base_model(folder / "base", base)
    return model_dir, {
        name: write_adapter(folder / name, model_dir, random_recipe(rng, base.num_layers, max_rank=32))
        for name in ("first", "second", "third")
    }


def test_a_sequence_among_strangers_draws_what_it_draws_alone(tmp_path: Path) -> None:
    model_dir, adapters = tiny_world(tmp_path)
    rng = np.random.default_rng(1)
    names = [*adapters, None] * 4
    prompts = [rng.integers(0, 384, int(rng.integers(1, 60))).tolist() for _ in names]
    together = make_rig(model_dir, adapters, num_pages=1024)
    alone = make_rig(model_dir, adapters, num_pages=1024, max_num_seqs=1, seed=1)

    sequences = [together.harness.add(p, adapter=together.adapters[n]) for p, n in zip(prompts, names, strict=True)]
    batched = together.harness.generate(sequences, 24)

    for prompt, name, expected in zip(prompts, names, batched, strict=True):
        single = Sequence_(slot=0, prompt=prompt, adapter=alone.adapters[name])
        assert alone.harness.generate([single], 24) == [expected]
        alone.harness.release([single])
    together.runner.close()
    alone.runner.close()


def test_any_split_of_a_prefill_into_chunks_draws_the_same(tmp_path: Path) -> None:
    model_dir, adapters = tiny_world(tmp_path)
    rig = make_rig(model_dir, adapters, num_pages=1024)
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, 384, 70).tolist()
    splits = [[], [1] * 69, [16] * 4, [15, 2, 33], [69]]
    splits += [np.diff([0, *np.sort(rng.choice(np.arange(1, 70), 5, replace=False))]).tolist() for _ in range(6)]

    sequences = [rig.harness.add(prompt, adapter=rig.adapters["first"], chunks=list(split)) for split in splits]
    drawn = rig.harness.generate(sequences, 16)

    assert all(tokens == drawn[0] for tokens in drawn)
    rig.runner.close()


def test_a_request_may_scale_its_adapter(tmp_path: Path) -> None:
    model_dir, adapters = tiny_world(tmp_path)
    rig = make_rig(model_dir, adapters, num_pages=1024)
    prompt = np.random.default_rng(3).integers(0, 384, 30).tolist()
    index = rig.adapters["second"]

    scaled = [rig.harness.add(prompt, adapter=index, scale=scale) for scale in (1.0, 0.0, 0.5)]
    base = rig.harness.add(prompt)
    full, none, half, plain = rig.harness.generate([*scaled, base], 24)

    assert none == plain
    assert len({tuple(full), tuple(half), tuple(plain)}) == 3
    rig.runner.close()
