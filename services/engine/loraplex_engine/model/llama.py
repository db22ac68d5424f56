"""The decoder of the Llama family: Llama 2/3, Mistral, Qwen2/2.5, Qwen3, told apart by `ModelConfig` alone.

Legend: T = tokens of the step, S = rows that sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from loraplex_common.adapter_image import OP_INDEX, OPS
from torch import Tensor

from loraplex_engine.model.layers import Dense, RmsNorm, new_activation
from loraplex_engine.model.rope import rope_table
from loraplex_engine.model.weights import BLOCKS

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.runners.torch.attention_plan import AttentionStep
    from loraplex_engine.runners.torch.lora import LoraStep

QKV, O, GATE_UP, DOWN = (OP_INDEX[op] for op in ("qkv", "o", "gate_up", "down"))  # noqa: E741


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


class Activations:
    """Buffers of a step of T tokens, shared by all layers and kept for the next step of as many tokens.

    Attributes:
        hidden: The residual stream, ``[T, hidden]``.
        x: Normed input of qkv and gate_up, ``[T, hidden]``; ``qkv``, ``attended``, ``hidden_out`` and ``gate_up`` are the
            outputs in the order of the layer. ``heads`` is qkv after RoPE, token-major ``[T, heads, head_dim]``.
    """

    def __init__(self, config: ModelConfig, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        def buffer(num_features: int) -> Tensor:
            return new_activation(num_tokens, num_features, dtype=dtype, device=device)

        num_heads = config.num_heads + 2 * config.num_kv_heads
        self.num_tokens = num_tokens
        self.hidden = buffer(config.hidden_size)
        self.x = buffer(config.hidden_size)
        self.qkv = buffer(num_heads * config.head_dim)
        self.qkv_heads = torch.unflatten(self.qkv, 1, (num_heads, config.head_dim))
        self.heads = torch.empty((num_tokens, num_heads, config.head_dim), dtype=dtype, device=device)
        self.attended = buffer(config.num_heads * config.head_dim)
        self.hidden_out = buffer(config.hidden_size)
        self.gate_up = buffer(2 * config.intermediate_size)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)


class LlamaModel:
    """A decoder with its weights; computes steps over a pool it does not own."""

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
        """Weights of the layers, for backends that compute the same decoder otherwise."""
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

    def forward(
        self,
        token_ids: Tensor,
        buffers: Activations,
        pool: PagedPool,
        attention: AttentionStep,
        lora: LoraStep | None,
    ) -> Tensor:
        """Compute a step's hidden states, ``[T, hidden]``; its keys and values are written to the pool."""
        hidden = buffers.hidden
        hidden.copy_(self._embedding.index_select(0, token_ids))
        rope = self._rope.index_select(0, attention.positions).to(self._dtype)
        cos, sin = rope[:, None, 0], rope[:, None, 1]
        cos = torch.cat((cos, cos), dim=-1)
        for index, layer in enumerate(self._layers):
            layer.input_norm.into(hidden, buffers.x)
            self._project(index, QKV, layer.qkv, buffers.x, buffers.qkv, lora)
            self._rotate(layer, buffers, cos, sin)
            pool.write(index, attention, buffers.heads[:, self.config.num_heads :])
            window = attention.windows[self.config.windows[index]]
            pool.attend(index, window, buffers.heads, buffers.attended)
            self._project(index, O, layer.o, buffers.attended, buffers.hidden_out, lora)
            hidden.add_(buffers.hidden_out)
            layer.post_norm.into(hidden, buffers.x)
            self._project(index, GATE_UP, layer.gate_up, buffers.x, buffers.gate_up, lora)
            F.silu(buffers.gate, inplace=True).mul_(buffers.up)
            self._project(index, DOWN, layer.down, buffers.gate, buffers.hidden_out, lora)
            hidden.add_(buffers.hidden_out)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states ``[S, hidden]``: ``[S, vocab]`` in the compute dtype, in either memory order."""
        rows = new_activation(hidden.shape[0], hidden.shape[1], dtype=self._dtype, device=self._device)
        rows.copy_(hidden)
        x = torch.empty_like(rows)
        self._norm.into(rows, x)
        out = new_activation(hidden.shape[0], self.config.vocab_size, dtype=self._dtype, device=self._device)
        self._lm_head.into(x, out)
        return out

    @staticmethod
    def _project(layer: int, op: int, dense: Dense, x: Tensor, out: Tensor, lora: LoraStep | None) -> None:
        dense.into(x, out)
        if lora is not None:
            lora.apply(layer, op, x, out)

    def _rotate(self, layer: DecoderLayer, buffers: Activations, cos: Tensor, sin: Tensor) -> None:
        """Fill ``buffers.heads`` from ``buffers.qkv``: RoPE on queries and keys, values as they are."""
        config = self.config
        num_rotated, half = config.num_heads + config.num_kv_heads, config.head_dim // 2
        heads = buffers.heads
        heads.copy_(buffers.qkv_heads)
        rotated = heads[:, :num_rotated]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated[:, : config.num_heads] = layer.q_norm(rotated[:, : config.num_heads])
            rotated[:, config.num_heads :] = layer.k_norm(rotated[:, config.num_heads :])
        plain = rotated.clone()
        rotated.mul_(cos)
        rotated[..., :half].addcmul_(plain[..., half:], sin, value=-1)
        rotated[..., half:].addcmul_(plain[..., :half], sin)


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
    names = {name: f"model.layers.{layer}.{BLOCKS[name]}.{name}" for name in OPS[op]}
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
