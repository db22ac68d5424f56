"""Real config.json files are read as transformers reads them, or refused with the entry named; none is misread.

`hub_configs.json` has those of dense families, by their name on the hub, each with the public repository, commit and path
where it was found: as a file, or its entries quoted in a program or a text. Long lists of quantised modules are cut.
Multimodal models are read by their text part.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from loraplex_common.architectures.registry import ARCHITECTURES, model_config
from loraplex_common.architectures.text_part import MULTIMODAL
from loraplex_common.config_values import BaseModelError
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

FOUND: Final[dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("hub_configs.json").read_text())
CONFIGS: Final = {name: found["config"] for name, found in FOUND.items()}
REFUSED: Final = {
    "ibm-granite/granite-4.0-h-1b": "layer_types",
    "Qwen/Qwen3-32B-FP8-Static-PerTensor": "quantization_config",
    "mistralai/Ministral-8B-Instruct-2410": "layer_types",
    "meta-llama/Llama-3.2-1B, with a second RoPE": "rope_scaling",
}
"""Configurations of architectures that are served -> the entry that is refused."""


def is_of_a_served_architecture(name: str) -> bool:
    return CONFIGS[name]["architectures"][0] in {*ARCHITECTURES, *MULTIMODAL}


def ours_of(name: str) -> ModelConfig:
    return model_config(CONFIGS[name], text_only=True)


def theirs_of(name: str) -> Any:
    """Return transformers' reading of a file; a name of a class goes before a model_type that became another one's."""
    is_text_of_gemma3 = CONFIGS[name]["architectures"] == ["Gemma3ForCausalLM"]
    whole: Any = AutoConfig.for_model(**CONFIGS[name] | ({"model_type": "gemma3_text"} if is_text_of_gemma3 else {}))
    text = whole.get_text_config()
    text.tie_word_embeddings = whole.tie_word_embeddings
    return text


def has_o_bias(theirs: Any) -> bool:
    """Tell whether transformers' decoder adds a bias behind attention: it is asked, as an entry of its own says so in some."""
    config = copy.deepcopy(theirs)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return model.model.layers[0].self_attn.o_proj.bias is not None


READ: Final = [name for name in CONFIGS if is_of_a_served_architecture(name) and name not in REFUSED]


def test_there_are_forty_that_are_read_and_each_says_where_it_was_found() -> None:
    assert len(READ) >= 40
    for name, found in FOUND.items():
        assert set(found) == {"repository", "commit", "path", "config"}, name
        assert found["repository"].count("/") == 1, name
        assert len(found["commit"]) == 40, name
        assert found["path"], name


def test_every_served_architecture_is_among_those_that_are_read() -> None:
    assert {CONFIGS[name]["architectures"][0] for name in READ} == {*ARCHITECTURES, *MULTIMODAL}


@pytest.mark.parametrize("name", READ)
def test_a_config_is_read_as_transformers_reads_it(name: str) -> None:
    read = ours_of(name)

    theirs = theirs_of(name)
    heads = theirs.num_attention_heads
    assert (read.num_layers, read.hidden_size, read.vocab_size) == (
        theirs.num_hidden_layers,
        theirs.hidden_size,
        theirs.vocab_size,
    )
    assert (read.num_heads, read.num_kv_heads) == (heads, theirs.num_key_value_heads)
    assert read.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert read.rms_norm_eps == theirs.rms_norm_eps
    assert read.tied_embeddings == theirs.tie_word_embeddings
    assert read.max_position_embeddings == theirs.max_position_embeddings
    assert read.o_bias == has_o_bias(theirs)
    assert read.mlp_bias == getattr(theirs, "mlp_bias", False)
    types = theirs.rope_parameters if "rope_theta" not in theirs.rope_parameters else {"all": theirs.rope_parameters}
    assert len(read.ropes) == len(types)
    for which, rope in zip(sorted(types), read.ropes, strict=True):  # of full attention, then of a window
        for key, value in types[which].items():
            assert rope.get(key, value) == value, (which, key)


@pytest.mark.parametrize("name", READ)
def test_windows_are_those_of_transformers(name: str) -> None:
    theirs = theirs_of(name)

    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None) if theirs.model_type != "llama" else None
    assert ours_of(name).windows == tuple(window if t == "sliding_attention" else None for t in types)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(READ)))
def test_what_is_not_served_is_refused_with_the_entry_and_a_remedy(name: str) -> None:
    with pytest.raises(BaseModelError) as refused:
        model_config(CONFIGS[name], "dir/config.json", text_only=True)

    said = str(refused.value)
    assert said.startswith("dir/config.json: ")
    assert (REFUSED[name] if is_of_a_served_architecture(name) else CONFIGS[name]["architectures"][0]) in said
    assert any(remedy in said for remedy in ("serve a model", "serve the model", "mend the entry"))


MEANT_BY_ANOTHER_CLASS: Final[dict[str, Any]] = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
    "logit_scale": 0.0625,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "no_rope_layers": [1, 1, 1, 0],
    "no_rope_layer_interval": 4,
    "rope_local_base_freq": 10000.0,
    "clip_qkv": 8.0,
    "use_qk_norm": True,
    "layer_norm_eps": 1e-5,
    "rotary_dim": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "text_config": {"hidden_size": 64},
    "quantization": {"bits": 4, "group_size": 64},
    "rope_interleaved": True,
    "is_encoder_decoder": True,
    "document_attention": True,
    "pruned_heads": {"0": [1]},
}


@pytest.mark.parametrize("key", MEANT_BY_ANOTHER_CLASS)
@pytest.mark.parametrize("name", ["TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Qwen/Qwen2-0.5B", "Qwen/Qwen3-8B"])
def test_an_entry_that_would_change_the_computation_is_never_passed_over(name: str, key: str) -> None:
    with pytest.raises(BaseModelError, match=f"dir/config.json: {key} .* is not served"):
        model_config(CONFIGS[name] | {key: MEANT_BY_ANOTHER_CLASS[key]}, "dir/config.json")


@pytest.mark.parametrize("key", ["mrope_section", "long_factor", "alpha", "llama_4_scaling_beta"])
def test_a_number_of_rope_that_is_not_computed_is_refused_with_its_section(key: str) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, key: 1.5}

    with pytest.raises(BaseModelError, match=rf"rope_scaling\.{key} 1\.5 is not served"):
        model_config(CONFIGS["meta-llama/Meta-Llama-3.1-8B"] | {"rope_scaling": rope})


@pytest.mark.parametrize(("key", "neutral"), [("logits_scaling", 1), ("no_rope_layers", []), ("use_qk_norm", False)])
def test_an_entry_at_the_value_that_changes_nothing_is_read(key: str, neutral: Any) -> None:
    config = CONFIGS["Qwen/Qwen3-8B"]

    assert model_config(config | {key: neutral}) == model_config(config | {key: None}) == model_config(config)


def test_several_unknown_entries_are_named_at_once() -> None:
    with pytest.raises(BaseModelError, match=r"scale_emb 12, scale_depth 1\.4 are not served"):
        model_config(CONFIGS["Qwen/Qwen3-8B"] | {"scale_emb": 12, "scale_depth": 1.4})
