"""Embedding and lm_head are the ones transformers uses, whatever config.json and the files say of each other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.base_model import BaseModelError
from safetensors.numpy import load_file, save_file
from support.base_models import TinyBase, write_base_model
from support.oracle import Comparison, Oracle, make_rig
from support.plans import Draw

if TYPE_CHECKING:
    from pathlib import Path

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUM_TOKENS = 5


def write_model(directory: Path, *, tie: bool | None, with_embed: bool = True, head: str | None = "other") -> Path:
    """Write a tiny model whose files bring the embedding or not, and no lm_head, an equal one or another."""
    write_base_model(directory, TinyBase())
    file = directory / "model.safetensors"
    weights = load_file(file)
    if head == "equal":
        weights[HEAD] = weights[EMBED] * np.float32(0.05)
        weights[EMBED] = weights[HEAD].copy()
    elif head is None:
        del weights[HEAD]
    if not with_embed:
        del weights[EMBED]
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(config if tie is None else config | {"tie_word_embeddings": tie}))
    return directory


@pytest.mark.parametrize(
    ("tie", "with_embed", "head"),
    [
        (True, True, "other"),
        (True, True, "equal"),
        (True, True, None),
        (True, False, "other"),
        (False, True, "other"),
        (None, True, "other"),
    ],
)
def test_the_head_is_the_one_that_transformers_takes(
    tmp_path: Path, tie: bool | None, with_embed: bool, head: str | None
) -> None:
    model_dir = write_model(tmp_path, tie=tie, with_embed=with_embed, head=head)
    oracle, rig, tally = Oracle(model_dir), make_rig(model_dir), Comparison()
    prompt = np.random.default_rng(0).integers(0, 384, 30).tolist()
    sequence = rig.harness.add(prompt, forced=oracle.greedy(prompt, NUM_TOKENS), draw=Draw(num_logprobs=384))

    rig.harness.generate([sequence], NUM_TOKENS + 1)

    truth = oracle.logits([*prompt, *sequence.forced[:NUM_TOKENS]])
    for step, token in enumerate(sequence.drawn):
        tally.choice(f"step {step}", truth[len(prompt) - 1 + step], token)
        tally.logprobs(truth[len(prompt) - 1 + step], sequence.logprobs[step])
    tally.check()
    rig.runner.close()


@pytest.mark.parametrize("tie", [False, None])
def test_a_head_that_transformers_would_draw_at_random_is_refused(tmp_path: Path, tie: bool | None) -> None:
    model_dir = write_model(tmp_path, tie=tie, head=None)

    with pytest.raises(BaseModelError, match=r"lm_head\.weight is missing.*tie_word_embeddings"):
        make_rig(model_dir)


def test_a_tied_model_without_either_is_refused(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path, tie=True, with_embed=False, head=None)

    with pytest.raises(BaseModelError, match=r"embed_tokens\.weight is missing"):
        make_rig(model_dir)
