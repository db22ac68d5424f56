"""Tiny random checkpoints of dense families, written by transformers itself, and random adapters of theirs, by peft."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from peft import LoraConfig, get_peft_model
from support.base_models import tiny_tokenizer_json
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping

VOCAB_SIZE: Final = 384
SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LONGROPE: Final[dict[str, Any]] = {
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.9],
        "long_factor": [1.0, 1.5, 2.5, 4.0, 7.0, 9.0],
    },
}
"""Six factors: three quarters of heads of 16, in pairs."""
GRANITE4: Final[dict[str, Any]] = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "layer_types": ["full_attention"] * 3,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 8,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "logits_scaling": 4.0,
}
FAMILIES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
            "logits_scaling": 4.0,
            "attention_bias": True,
        },
    ),
    "granite tied": ("granite", {"tie_word_embeddings": True, "logits_scaling": 0.5, "mlp_bias": True}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "attention_bias": True, "tie_word_embeddings": False}),
    "smollm3 windows": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9, "mlp_bias": True},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True}),
    "glm4": ("glm4", {"head_dim": 24, "pad_token_id": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 4, "sliding_window": 11}),
    "phi3 short": ("phi3", LONGROPE | {"original_max_position_embeddings": 256}),
    "phi3 long": ("phi3", LONGROPE | {"original_max_position_embeddings": 2, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 24,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "gemma3 untied": (
        "gemma3_text",
        {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": False, "final_logit_softcapping": 8.0},
    ),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 900.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
            },
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 900.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "granite4": ("granitemoehybrid", GRANITE4 | {"position_embedding_type": "rope", "attention_bias": True}),
}
"""By name: transformers' ``model_type``, and what differs from `SIZES`."""


def _sized(suffix: str, *, num_layers: int, num_kv_heads: int) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return families with heads of 64 dimensions: kernels take no smaller ones."""
    kinds = ["sliding_attention", "full_attention"] * (num_layers // 2)
    sizes = {
        "hidden_size": 128 * num_kv_heads,
        "intermediate_size": 128 * num_kv_heads,
        "num_attention_heads": 2 * num_kv_heads,
        "num_key_value_heads": num_kv_heads,
        "num_hidden_layers": num_layers,
    }
    phi_rope = {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.75}
    changes: dict[str, dict[str, Any]] = {
        "granite": {},
        "granite4": {"shared_intermediate_size": 128 * num_kv_heads, "layer_types": ["attention"] * num_layers},
        "olmo2": {},
        "olmo3": {"layer_types": kinds},
        "smollm3": {"no_rope_layers": [1, 0] * (num_layers // 2)},
        "glm4": {"head_dim": 64},
        "phi3": {"rope_parameters": phi_rope},
        "gemma2": {"head_dim": 64, "tie_word_embeddings": False},
        "gemma3": {"head_dim": 64, "layer_types": kinds},
        "ministral3": {"head_dim": 64},
    }
    return {
        f"{name} {suffix}": (FAMILIES[name][0], {**FAMILIES[name][1], **sizes, **own}) for name, own in changes.items()
    }


SHIM_FAMILIES: Final = _sized("on the host shim", num_layers=2, num_kv_heads=1)
"""Families whose tiny models our kernels compute: each value for which there is a kernel occurs."""
GPU_FAMILIES: Final = _sized("on a GPU", num_layers=4, num_kv_heads=2)
"""The same with KV pages of at least a tile in bf16."""


def family_config(name: str) -> Any:
    """Return transformers' configuration of a family's tiny model."""
    model_type, changes = {**FAMILIES, **SHIM_FAMILIES, **GPU_FAMILIES}[name]
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


@functools.cache
def family_dir(name: str) -> Path:
    """Return the folder of a family's tiny model, written once per process; it is removed with the process."""
    holder = tempfile.TemporaryDirectory()
    _HOLDERS.append(holder)
    directory = Path(holder.name)
    torch.manual_seed(11)
    model: Any = AutoModelForCausalLM.from_config(family_config(name), dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json(VOCAB_SIZE))
    return directory


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def draw_weights(model: Any) -> None:
    """Draw all weights of a model."""
    for path, weight in model.named_parameters():
        _draw(path, weight)


@torch.no_grad()
def _draw(path: str, weight: torch.nn.Parameter) -> None:
    """Draw a weight so that every part of a layer matters and greedy choices are far from ties."""
    if "norm" in path:
        weight.add_(0.2 * torch.randn_like(weight))
    elif path.endswith(".bias"):
        weight.normal_(std=0.2)
    elif "embed_tokens" in path:
        weight.normal_()
    else:
        weight.normal_(std=(3.0 if "lm_head" in path else 1.0) / weight.shape[-1] ** 0.5)


def write_family_adapter(
    directory: Path, name: str, targets: list[str], *, rank: int, seed: int, **settings: Any
) -> Path:
    """Write a random adapter of some modules of a family's model, the first of them with twice the rank.

    Further settings are those of `LoraConfig`.

    Returns:
        ``directory``.
    """
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(family_dir(name), dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        rank_pattern={targets[0]: 2 * rank},
        task_type="CAUSAL_LM",
        **settings,
    )
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for path, weight in adapted.named_parameters():
            if "trainable_tokens_delta" in path:
                weight.normal_()
            if "lora_" in path:
                weight.normal_(std=0.3 / max(weight.shape[-1], 8) ** 0.5)
                if "lora_embedding_A" in path:
                    weight.normal_(std=0.3)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": ""}))
    return directory
