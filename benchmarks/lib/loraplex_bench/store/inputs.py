"""A base model's configuration without its weights, and adapters of it: all that a store looks at."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import from_bfloat16, to_bfloat16
from loraplex_common.base_model import BaseModelInfo, load_base_model
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, tiny_tokenizer_json
from support.safetensors_files import assemble, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator
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


def write_random_model(folder: Path, shape: TinyBase) -> Path:
    """Write a model of a shape that an engine can run: every matrix repeats one random block, in bf16.

    Returns:
        ``folder``.
    """
    write_base(folder, shape)
    rng = np.random.default_rng(0)
    block = to_bfloat16(rng.standard_normal(1 << 22, dtype=np.float32))
    header, position = {}, 0
    shapes = dict(_weights(shape))
    for name, dims in shapes.items():
        end = position + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [position, end]}
        position = end
    with (folder / "model.safetensors").open("wb") as file:
        file.write(assemble(header, b""))
        for dims in shapes.values():
            std = 1.0 if len(dims) == 1 else 1 / math.sqrt(dims[1])
            values = np.ones_like(block, dtype=np.float32) if len(dims) == 1 else from_bfloat16(block) * np.float32(std)
            repeated, left = to_bfloat16(values).tobytes(), 2 * math.prod(dims)
            while left:
                left -= file.write(repeated[:left])
    return folder


def _weights(shape: TinyBase) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for name, dims in (
            ("self_attn.q_proj", (query, hidden)),
            ("self_attn.k_proj", (key_value, hidden)),
            ("self_attn.v_proj", (key_value, hidden)),
            ("self_attn.o_proj", (hidden, query)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            yield f"{prefix}{name}.weight", dims
    yield "model.norm.weight", (hidden,)
