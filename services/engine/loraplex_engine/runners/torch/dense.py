"""The torch backend's forward pass of `DenseModel`.

Legend: T = tokens of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812

from loraplex_engine.model.dense import DenseModel
from loraplex_engine.runners.torch.forward import DOWN, GATE_UP, QKV, O, TorchForward

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.model.dense import DenseLayer
    from loraplex_engine.model.layers import RmsNorm
    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.runners.torch.attention_plan import AttentionStep
    from loraplex_engine.runners.torch.forward import Activations
    from loraplex_engine.runners.torch.lora import LoraStep


class DenseForward(TorchForward[DenseModel]):
    """The forward pass of `DenseModel`."""

    def compute(
        self,
        token_ids: Tensor,
        buffers: Activations,
        pool: PagedPool,
        attention: AttentionStep,
        lora: LoraStep | None,
    ) -> Tensor:
        """See `TorchForward`."""
        config, hidden, x, out = self._model.config, buffers.hidden, buffers.x, buffers.hidden_out
        self._embed(token_ids, hidden, lora)
        if self._model.embedding_multiplier != 1.0:
            hidden.mul_(self._model.embedding_multiplier)
        ropes = [table.index_select(0, attention.positions).to(hidden.dtype) for table in self._model.ropes]
        query_scale = self._query_scale(attention.positions, hidden.dtype)
        for index, layer in enumerate(self._model.layers):
            _norm(layer.before_attention, hidden, x)
            self._project(index, QKV, layer.qkv, x, buffers.qkv, lora)
            self._fill_heads(layer, buffers, None if (which := config.rope_of(index)) is None else ropes[which])
            if query_scale is not None:
                buffers.heads[:, : config.num_heads].mul_(query_scale)
            pool.write(index, attention.write_index, buffers.heads[:, config.num_heads :])
            window = attention.windows[config.windows[index]]
            pool.attend(index, window, buffers.heads, buffers.attended)
            self._project(index, O, layer.o, buffers.attended, out, lora)
            self._add(layer.after_attention, buffers)
            _norm(layer.before_mlp, hidden, x)
            self._project(index, GATE_UP, layer.gate_up, x, buffers.gate_up, lora)
            self._activate(buffers)
            self._project(index, DOWN, layer.down, buffers.gate, out, lora)
            self._add(layer.after_mlp, buffers)
        return hidden

    def _add(self, norm: RmsNorm | None, buffers: Activations) -> None:
        """Add what attention or MLP computed to the residual stream, behind its norm."""
        out = buffers.hidden_out
        if norm is not None:
            norm.into(out, buffers.x)
            out = buffers.x
        buffers.hidden.add_(out, alpha=self._model.config.traits.residual_multiplier)

    def _activate(self, buffers: Activations) -> None:
        """Write the input of the last projection of the MLP into ``buffers.gate``."""
        if self._model.config.traits.activation == "gelu_tanh":
            torch.mul(F.gelu(buffers.gate, approximate="tanh"), buffers.up, out=buffers.gate)
        else:
            F.silu(buffers.gate, inplace=True).mul_(buffers.up)

    def _query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the factor of the step's queries, ``[T, 1, 1]``; None if it is 1."""
        table = self._model.query_scale
        return None if table is None else table.index_select(0, positions).to(dtype)[:, None, None]

    def _fill_heads(self, layer: DenseLayer, buffers: Activations, rope: Tensor | None) -> None:
        """Fill ``buffers.heads`` from ``buffers.qkv``: norms, then RoPE on queries and keys; values as they are.

        Args:
            layer: Weights of the layer.
            buffers: The step's.
            rope: ``[T, 2, rotary_dim / 2]``; cosines, then sines of the step's tokens; None if the layer has no RoPE.
        """
        config, traits = self._model.config, self._model.config.traits
        buffers.heads.copy_(buffers.qkv_heads)
        rotated = buffers.heads[:, : config.num_heads + config.num_kv_heads]
        for norm, heads in (
            (layer.q_norm, rotated[:, : config.num_heads]),
            (layer.k_norm, rotated[:, config.num_heads :]),
        ):
            if norm is not None:
                heads.copy_(norm(heads.flatten(1)).view_as(heads) if traits.norms_whole_qk else norm(heads))
        if rope is None:
            return
        cos, sin = rope[:, None, 0], rope[:, None, 1]
        dim = config.rotary_dim
        if traits.interleaved:
            first, second = rotated[..., 0:dim:2], rotated[..., 1:dim:2]
        else:
            first, second = rotated[..., : dim // 2], rotated[..., dim // 2 : dim]
        plain = first.clone()
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(plain, sin)


def _norm(norm: RmsNorm | None, hidden: Tensor, x: Tensor) -> None:
    """Write the input of attention or MLP: the residual stream, normed where the architecture does so."""
    if norm is None:
        x.copy_(hidden)
    else:
        norm.into(hidden, x)
