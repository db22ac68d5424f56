"""The weights of the Llama family: Llama 2/3, Mistral, Qwen2/2.5, Qwen3, told apart by `ModelConfig` alone.

Legend: S = rows that sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_engine.model.layers import Dense, RmsNorm, new_activation
from loraplex_engine.model.rope import rope_table

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.model.weights import WeightSource


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer; q_norm and k_norm only where the architecture has them."""

    input_norm: RmsNorm
    qkv: Dense
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    o: Dense
    post_norm: RmsNorm
    gate_up: Dense
    down: Dense


class LlamaModel:
    """A decoder's weights, and its logits; each backend computes the layers in its own way."""

    def __init__(self, config: ModelConfig, reader: WeightSource, *, max_model_len: int, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._embedding, self._lm_head = _read_embeddings(config, reader)
        self._dtype = self._embedding.dtype
        self._layers = [_read_layer(config, reader, layer) for layer in range(config.num_layers)]
        self._norm = RmsNorm(reader.read("model.norm.weight", (config.hidden_size,)), config.rms_norm_eps)
        self._rope = rope_table(config, max_model_len).to(device)

    @property
    def layers(self) -> list[DecoderLayer]:
        """Weights of the layers."""
        return self._layers

    @property
    def embedding(self) -> Tensor:
        """``[vocab, hidden]``."""
        return self._embedding

    @property
    def final_norm(self) -> RmsNorm:
        """The norm before lm_head."""
        return self._norm

    @property
    def lm_head(self) -> Dense:
        """The output projection."""
        return self._lm_head

    @property
    def rope(self) -> Tensor:
        """RoPE table, fp32 ``[positions, 2, head_dim / 2]``: cosines, then sines."""
        return self._rope

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states ``[S, hidden]``: ``[S, vocab]`` in the compute dtype, in either memory order."""
        rows = new_activation(hidden.shape[0], hidden.shape[1], dtype=self._dtype, device=self._device)
        rows.copy_(hidden)
        x = torch.empty_like(rows)
        self._norm.into(rows, x)
        out = new_activation(hidden.shape[0], self.config.vocab_size, dtype=self._dtype, device=self._device)
        self._lm_head.into(x, out)
        return out


def _read_embeddings(config: ModelConfig, reader: WeightSource) -> tuple[Tensor, Dense]:
    """Return embedding and lm_head; of a tied pair, one tensor, whichever the files bring.

    Where config.json ties them and the files bring two that differ, the files are right, as in transformers 5.
    """
    shape, embed, head = (config.vocab_size, config.hidden_size), "model.embed_tokens.weight", "lm_head.weight"
    if config.tied_embeddings and not (reader.has(embed) and reader.has(head)):
        tied = reader.read(head if reader.has(head) else embed, shape)
        return tied, Dense(tied)
    embedding, lm_head = reader.read(embed, shape), reader.read(head, shape)
    if config.tied_embeddings and torch.equal(embedding, lm_head):
        return embedding, Dense(embedding)
    return embedding, Dense(lm_head)


def _read_dense(config: ModelConfig, reader: WeightSource, layer: int, op: str, *, has_bias: bool) -> Dense:
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q_proj": (query, config.hidden_size),
        "k_proj": (key_value, config.hidden_size),
        "v_proj": (key_value, config.hidden_size),
        "o_proj": (config.hidden_size, query),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    names = {each.name: f"model.layers.{layer}.{each.path}" for each in config.layers[layer] if each.op == op}
    weight = reader.read_stacked((f"{full}.weight", shapes[name]) for name, full in names.items())
    if not has_bias:
        return Dense(weight)
    return Dense(weight, reader.read_stacked((f"{full}.bias", shapes[name][:1]) for name, full in names.items()))


def _read_layer(config: ModelConfig, reader: WeightSource, layer: int) -> DecoderLayer:
    def norm(name: str, width: int) -> RmsNorm:
        return RmsNorm(reader.read(f"model.layers.{layer}.{name}.weight", (width,)), config.rms_norm_eps)

    return DecoderLayer(
        input_norm=norm("input_layernorm", config.hidden_size),
        qkv=_read_dense(config, reader, layer, "qkv", has_bias=config.qkv_bias),
        q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        o=_read_dense(config, reader, layer, "o", has_bias=config.o_bias),
        post_norm=norm("post_attention_layernorm", config.hidden_size),
        gate_up=_read_dense(config, reader, layer, "gate_up", has_bias=config.mlp_bias),
        down=_read_dense(config, reader, layer, "down", has_bias=config.mlp_bias),
    )
