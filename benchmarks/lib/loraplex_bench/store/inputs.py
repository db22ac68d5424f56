"""A base model's configuration without its weights, and adapters of it: all that a store looks at."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.base_model import BaseModelInfo, load_base_model
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, tiny_tokenizer_json
from support.safetensors_files import write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

LLAMA3_8B = TinyBase(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
TINY = TinyBase()


def write_base(folder: Path, shape: TinyBase) -> BaseModelInfo:
    """Write config and tokenizer of a model, and a weight file that only its digest is taken of."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json(384))
    write_safetensors(folder / "model.safetensors", {"model.norm.weight": np.ones(8, dtype=np.float32)}, "float32")
    return load_base_model(folder)


def write_adapters(folder: Path, base_dir: Path, count: int, dtype: str, rank: int = 16) -> list[Path]:
    """Write adapters that differ in one value: equal work, different revisions.

    Returns:
        Their directories.
    """
    first = write_adapter(folder / "0", base_dir, Recipe(rank=rank, dtype=dtype))
    found = [first]
    for number in range(1, count):
        copy = folder / str(number)
        copy.mkdir()
        (copy / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
        weights = bytearray((first / "adapter_model.safetensors").read_bytes())
        weights[-8] = number  # low bits of one value of the last tensor
        (copy / "adapter_model.safetensors").write_bytes(weights)
        found.append(copy)
    return found
