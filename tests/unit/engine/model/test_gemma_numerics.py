"""What Gemma rounds and caps otherwise than Llama: norms, the embeddings' factor, logits and scores."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import load_base_model
from loraplex_engine.model.layers import TORCH_LINEARS, RmsNorm
from loraplex_engine.model.registry import read_model
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.runners.torch import softcap
from loraplex_engine.runners.torch.softcap import capped_attention
from support.families import VOCAB_SIZE, family_dir
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

if TYPE_CHECKING:
    from loraplex_engine.model.decoder_model import DecoderModel

CPU = torch.device("cpu")


def model_of(name: str, dtype: torch.dtype) -> DecoderModel[Any]:
    config = model_config(load_base_model(family_dir(name)).config)
    reader = WeightReader(family_dir(name), dtype=dtype, device=CPU)
    return read_model(config, reader, TORCH_LINEARS, max_model_len=64, device=CPU)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_an_offset_rounds_once_as_in_transformers(dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(1)
    theirs = Gemma2RMSNorm(64, eps=1e-6).to(dtype)
    theirs.weight.data = torch.randn(64).to(dtype)
    x = (3 * torch.randn(num_tokens, 64)).to(dtype)
    ours = RmsNorm(theirs.weight.data, 1e-6, 1.0)

    out = torch.empty_like(x)
    ours.into(x, out)

    expected = theirs(x).detach()
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_the_factor_of_embeddings_is_rounded_to_the_compute_dtype() -> None:
    config = json.loads((family_dir("gemma2") / "config.json").read_text())
    assert model_config(config).traits.embedding_multiplier == 8.0

    wide = model_config(config | {"hidden_size": 3072}).traits
    assert wide.rounds_embedding_multiplier
    assert torch.tensor(wide.embedding_multiplier, dtype=torch.bfloat16).item() == 55.5
    assert model_of("gemma2", torch.bfloat16).embedding_multiplier == 8.0
    assert model_of("granite", torch.bfloat16).embedding_multiplier == 3.0


def test_logits_of_tokens_that_an_adapter_lacks_stay_impossible_under_a_cap() -> None:
    model = model_of("gemma2", torch.float32)
    logits = torch.full((2, VOCAB_SIZE + 3), 100.0)
    logits[0, VOCAB_SIZE:] = float("-inf")
    logits[1, VOCAB_SIZE + 1] = -100.0

    finished = model.finish_logits(logits.clone())

    assert finished[:, :VOCAB_SIZE].allclose(torch.tensor(9.0))
    assert finished[0, VOCAB_SIZE:].isneginf().all()
    assert finished[1, VOCAB_SIZE:].allclose(torch.tensor([9.0, -9.0, 9.0]))


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("max_scores", [1 << 22, 100])
def test_capped_attention_is_what_its_definition_says_however_many_scores_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: str, max_scores: int
) -> None:
    monkeypatch.setattr(softcap, "MAX_SCORES", max_scores)
    torch.manual_seed(2)
    num_queries, num_keys = 7, 7 if kind == "causal" else 11
    group_size = 1 if kind == "additive" else 3
    queries, keys = torch.randn(2 * group_size, num_queries, 8), torch.randn(2, num_keys, 8)
    values = torch.randn(2, num_keys, 8)
    visible = torch.rand(num_queries, num_keys) < 0.7
    visible[:, 0] = True
    mask = {
        "causal": None,
        "boolean": visible,
        "additive": torch.zeros(2, num_queries, num_keys).masked_fill(~visible, float("-inf")),
    }[kind]

    found = capped_attention(queries, keys, values, mask, scale=2.0, cap=1.5)

    scores = 1.5 * torch.tanh(2.0 * queries @ keys.repeat_interleave(group_size, 0).mT / 1.5)
    seen = torch.ones(num_queries, num_keys).tril().bool() if kind == "causal" else visible
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(found, weights @ values.repeat_interleave(group_size, 0))
