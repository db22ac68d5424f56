"""Tiny random base models of every served architecture, in Hugging Face layout, written with numpy alone."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from support.safetensors_files import write_safetensors
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (BOS, EOS, IM_START, IM_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and the small model serves many adapters to many people",
    "a page is a page, whether it holds keys and values or the weights of an adapter",
    "tokens stream over the wire one after another; the batch mixes ranks, targets and layers",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyBase:
    """The shape of a tiny base model; the defaults make a two-layer Llama with grouped-query attention.

    Attributes:
        rope_scaling: As in config.json, e.g. the ``llama3`` rule; None for plain RoPE.
        bias: Whether q, k and v have biases; None means as the architecture has them (Qwen2 does).
        logit_std: Typical standard deviation of the logits. The median gap of the best two stays above 1 % of the
            largest, so greedy choices are far from ties (docs/testing.md).
        successor_logit: Logit that a token's embedding, undisturbed by the layers, gives to one successor of its own; 0
            for none. Comparisons in bf16 need it (ADR 12).
        num_shards: Number of weight files; more than one also writes an index.
    """

    architecture: Architecture = "llama"
    num_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 384
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bias: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    logit_std: float = 3.0
    successor_logit: float = 0.0
    seed: int = 0
    num_shards: int = 1
    name_or_path: str = ""
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def has_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.architecture == "qwen2" if self.bias is None else self.bias


@functools.cache
def tiny_tokenizer_json(vocab_size: int) -> str:
    """Return tokenizer.json of a byte-level BPE with chat markers and at most ``vocab_size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return str(tokenizer.to_str())


def _config(base: TinyBase) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [f"{CLASSES[base.architecture]}ForCausalLM"],
        "model_type": base.architecture,
        "num_hidden_layers": base.num_layers,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_attention_heads": base.num_heads,
        "num_key_value_heads": base.num_kv_heads,
        "head_dim": base.head_dim,
        "vocab_size": base.vocab_size,
        "max_position_embeddings": base.max_position_embeddings,
        "rms_norm_eps": base.rms_norm_eps,
        "rope_theta": base.rope_theta,
        "rope_scaling": base.rope_scaling,
        "tie_word_embeddings": base.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": base.dtype,
    }
    if base.architecture in ("mistral", "qwen2", "qwen3"):
        config["sliding_window"] = base.sliding_window
    if base.architecture in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": base.sliding_window is not None, "max_window_layers": 0}
    if base.architecture in ("llama", "qwen3"):
        config["attention_bias"] = base.has_bias
    if base.name_or_path:
        config["_name_or_path"] = base.name_or_path
    return config


def _weights(base: TinyBase) -> Iterator[tuple[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(base.seed)

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    def linear(outputs: int, inputs: int) -> NDArray[np.float32]:
        return normal(outputs, inputs, std=1 / math.sqrt(inputs))

    head_std = base.logit_std / math.sqrt(base.hidden_size)  # the final norm leaves the hidden state at RMS 1
    embedding = normal(base.vocab_size, base.hidden_size, std=head_std if base.tie_word_embeddings else 1.0)
    yield "model.embed_tokens.weight", embedding
    query, key_value = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    for layer in range(base.num_layers):
        prefix = f"model.layers.{layer}."
        for name, outputs in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
            yield f"{prefix}self_attn.{name}.weight", linear(outputs, base.hidden_size)
            if base.has_bias:
                yield f"{prefix}self_attn.{name}.bias", normal(outputs, std=0.1)
        yield f"{prefix}self_attn.o_proj.weight", linear(base.hidden_size, query)
        if base.has_bias and base.architecture in ("llama", "qwen3"):  # their attention_bias covers o_proj too
            yield f"{prefix}self_attn.o_proj.bias", normal(base.hidden_size, std=0.1)
        if base.architecture == "qwen3":
            yield f"{prefix}self_attn.q_norm.weight", 1 + normal(base.head_dim, std=0.1)
            yield f"{prefix}self_attn.k_norm.weight", 1 + normal(base.head_dim, std=0.1)
        yield f"{prefix}mlp.gate_proj.weight", linear(base.intermediate_size, base.hidden_size)
        yield f"{prefix}mlp.up_proj.weight", linear(base.intermediate_size, base.hidden_size)
        yield f"{prefix}mlp.down_proj.weight", linear(base.hidden_size, base.intermediate_size)
        yield f"{prefix}input_layernorm.weight", 1 + normal(base.hidden_size, std=0.1)
        yield f"{prefix}post_attention_layernorm.weight", 1 + normal(base.hidden_size, std=0.1)
    yield "model.norm.weight", np.ones(base.hidden_size, dtype=np.float32)
    if not base.tie_word_embeddings:
        # Rows of unequal length give the logits a heavier tail, and so a wider gap between the best two.
        row_scale = np.exp(normal(base.vocab_size, 1, std=0.4))
        head = row_scale * normal(base.vocab_size, base.hidden_size, std=head_std)
        if base.successor_logit:
            head[rng.permutation(base.vocab_size)] += np.float32(base.successor_logit / base.hidden_size) * embedding
        yield "lm_head.weight", head


def _write_weights(directory: Path, base: TinyBase) -> None:
    weights = list(_weights(base))
    if base.num_shards == 1:
        write_safetensors(directory / "model.safetensors", dict(weights), base.dtype)
        return
    weight_map: dict[str, str] = {}
    for shard in range(base.num_shards):
        file_name = f"model-{shard + 1:05d}-of-{base.num_shards:05d}.safetensors"
        part = dict(weights[shard :: base.num_shards])
        write_safetensors(directory / file_name, part, base.dtype)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_base_model(directory: Path, base: TinyBase | None = None) -> Path:
    """Write a tiny random base model that transformers and the engine load alike.

    Returns:
        ``directory``, with config.json, weights, tokenizer.json, tokenizer_config.json and generation_config.json.
    """
    base = base or TinyBase()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config(base), indent=1))
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json(min(base.vocab_size, 384)))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": base.max_position_embeddings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": [1, 3], "do_sample": False} | base.generation
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1))
    _write_weights(directory, base)
    return directory
