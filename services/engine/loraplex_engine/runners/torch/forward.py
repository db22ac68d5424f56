"""The torch backend's forward pass over the layers of a decoder, and Llama's.

Legend: T = tokens of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_engine.model.layers import new_activation
from loraplex_engine.model.llama import LlamaModel

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.model.layers import RmsNorm
    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.runners.torch.attention_plan import AttentionStep
    from loraplex_engine.runners.torch.lora import LoraStep

QKV, O, GATE_UP, DOWN = ("qkv", "o", "gate_up", "down")  # noqa: E741

ModelT = TypeVar("ModelT", bound="DecoderModel[Any]")


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


class TorchForward(ABC, Generic[ModelT]):
    """Computes steps of one model over a pool it does not own; what forward passes of all decoders use."""

    def __init__(self, model: ModelT) -> None:
        self._model = model
        self._group = model.group

    @abstractmethod
    def compute(
        self,
        token_ids: Tensor,
        buffers: Activations,
        pool: PagedPool,
        attention: AttentionStep,
        lora: LoraStep | None,
    ) -> Tensor:
        """Compute a step's hidden states, ``[T, hidden]``; its keys and values are written to the pool.

        Args:
            token_ids: int64 ``[T]``.
            buffers: From `new_buffers`.
            pool: Keys and values.
            attention: The step's sequences.
            lora: The step's adapters, if any row has one.
        """

    def new_buffers(self, num_tokens: int) -> Activations:
        """Return buffers for steps of so many tokens."""
        embedding = self._model.embedding
        return Activations(self._model.config, num_tokens, dtype=embedding.dtype, device=embedding.device)

    def _cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return RoPE of the step's tokens: cosines ``[T, 1, head_dim]`` and sines ``[T, 1, head_dim / 2]``."""
        rope = self._model.rope.index_select(0, positions).to(dtype)
        cos, sin = rope[:, None, 0], rope[:, None, 1]
        return torch.cat((cos, cos), dim=-1), sin

    def _embed(self, token_ids: Tensor, hidden: Tensor, lora: LoraStep | None) -> None:
        """Write the step's embeddings with the step's adapters."""
        if lora is None or lora.outside is None:
            self._model.embed(token_ids, hidden)
        else:
            lora.outside.embed(token_ids, self._model.embedding, hidden)

    def _project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, lora: LoraStep | None) -> None:
        """Compute a fused projection of one layer with the step's adapters, which a group's collective sums up with the base."""
        if lora is None:
            linear.into(x, out)
        else:
            lora.project(layer, op, linear, x, out)
        if self._group is not None and op in (O, DOWN):
            self._group.all_reduce(out)

    def _rotate(
        self, q_norm: RmsNorm | None, k_norm: RmsNorm | None, buffers: Activations, cos: Tensor, sin: Tensor
    ) -> None:
        """Fill ``buffers.heads`` from ``buffers.qkv``: RoPE on queries and keys, behind their norms; values as they are."""
        config = self._model.config
        num_rotated, half = config.num_heads + config.num_kv_heads, config.head_dim // 2
        heads = buffers.heads
        heads.copy_(buffers.qkv_heads)
        rotated = heads[:, :num_rotated]
        if q_norm is not None and k_norm is not None:
            rotated[:, : config.num_heads] = q_norm(rotated[:, : config.num_heads])
            rotated[:, config.num_heads :] = k_norm(rotated[:, config.num_heads :])
        plain = rotated.clone()
        rotated.mul_(cos)
        rotated[..., :half].addcmul_(plain[..., half:], sin, value=-1)
        rotated[..., half:].addcmul_(plain[..., :half], sin)


class LlamaForward(TorchForward[LlamaModel]):
    """The forward pass of `LlamaModel`."""

    def compute(
        self,
        token_ids: Tensor,
        buffers: Activations,
        pool: PagedPool,
        attention: AttentionStep,
        lora: LoraStep | None,
    ) -> Tensor:
        """See `TorchForward`."""
        config, hidden = self._model.config, buffers.hidden
        self._embed(token_ids, hidden, lora)
        cos, sin = self._cos_sin(attention.positions, hidden.dtype)
        for index, layer in enumerate(self._model.layers):
            layer.input_norm.into(hidden, buffers.x)
            self._project(index, QKV, layer.qkv, buffers.x, buffers.qkv, lora)
            self._rotate(layer.q_norm, layer.k_norm, buffers, cos, sin)
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
