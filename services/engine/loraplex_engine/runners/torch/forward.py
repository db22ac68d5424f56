"""The torch backend's forward pass over the layers of a Llama-like model.

Legend: T = tokens of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_engine.model.layers import new_activation

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.model.layers import Dense
    from loraplex_engine.model.llama import DecoderLayer, LlamaModel
    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.runners.torch.attention_plan import AttentionStep
    from loraplex_engine.runners.torch.lora import LoraStep

QKV, O, GATE_UP, DOWN = ("qkv", "o", "gate_up", "down")  # noqa: E741


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


class LlamaForward:
    """Computes steps of one model over a pool it does not own."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    def compute(
        self,
        token_ids: Tensor,
        buffers: Activations,
        pool: PagedPool,
        attention: AttentionStep,
        lora: LoraStep | None,
    ) -> Tensor:
        """Compute a step's hidden states, ``[T, hidden]``; its keys and values are written to the pool."""
        config, hidden = self._model.config, buffers.hidden
        hidden.copy_(self._model.embedding.index_select(0, token_ids))
        rope = self._model.rope.index_select(0, attention.positions).to(hidden.dtype)
        cos, sin = rope[:, None, 0], rope[:, None, 1]
        cos = torch.cat((cos, cos), dim=-1)
        for index, layer in enumerate(self._model.layers):
            layer.input_norm.into(hidden, buffers.x)
            self._project(index, QKV, layer.qkv, buffers.x, buffers.qkv, lora)
            self._rotate(layer, buffers, cos, sin)
            pool.write(index, attention.write_index, buffers.heads[:, config.num_heads :])
            window = attention.windows[config.windows[index]]
            pool.attend(index, window, buffers.heads, buffers.attended)
            self._project(index, O, layer.o, buffers.attended, buffers.hidden_out, lora)
            hidden.add_(buffers.hidden_out)
            layer.post_norm.into(hidden, buffers.x)
            self._project(index, GATE_UP, layer.gate_up, buffers.x, buffers.gate_up, lora)
            F.silu(buffers.gate, inplace=True).mul_(buffers.up)
            self._project(index, DOWN, layer.down, buffers.gate, buffers.hidden_out, lora)
            hidden.add_(buffers.hidden_out)
        return hidden

    @staticmethod
    def _project(layer: int, op: str, dense: Dense, x: Tensor, out: Tensor, lora: LoraStep | None) -> None:
        dense.into(x, out)
        if lora is not None:
            lora.apply(layer, op, x, out)

    def _rotate(self, layer: DecoderLayer, buffers: Activations, cos: Tensor, sin: Tensor) -> None:
        """Fill ``buffers.heads`` from ``buffers.qkv``: RoPE on queries and keys, values as they are."""
        config = self._model.config
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
