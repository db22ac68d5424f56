"""The decoder of dense families that differ from Llama in `DenseTraits`: multipliers, caps, places of norms, several RoPEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_engine.model.decoder_model import DecoderModel
from loraplex_engine.model.layers import RmsNorm
from loraplex_engine.model.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.model.decoder_model import LayerReader


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Weights of one layer; a norm is None where the architecture has none."""

    before_attention: RmsNorm | None
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    o: Linear
    after_attention: RmsNorm | None
    before_mlp: RmsNorm | None
    gate_up: Linear
    down: Linear
    after_mlp: RmsNorm | None


class DenseModel(DecoderModel[DenseLayer]):
    """Attention, then a gated MLP, with norms and factors as `DenseTraits` says."""

    def _read_layer(self, reader: LayerReader) -> DenseLayer:
        config, names, traits = reader.config, reader.config.names, reader.config.traits

        def norm(name: str | None, width: int = config.hidden_size) -> RmsNorm | None:
            return None if name is None else reader.norm(name, width)

        q_heads, k_heads = (config.num_heads, config.num_kv_heads) if traits.norms_whole_qk else (1, 1)
        return DenseLayer(
            before_attention=norm(traits.before_attention),
            qkv=reader.linear("qkv", has_bias=config.qkv_bias),
            q_norm=norm(names.q_norm, q_heads * config.head_dim) if config.qk_norm else None,
            k_norm=norm(names.k_norm, k_heads * config.head_dim) if config.qk_norm else None,
            o=reader.linear("o", has_bias=config.o_bias),
            after_attention=norm(traits.after_attention),
            before_mlp=norm(traits.before_mlp),
            gate_up=reader.linear("gate_up", has_bias=config.mlp_bias),
            down=reader.linear("down", has_bias=config.mlp_bias),
            after_mlp=norm(traits.after_mlp),
        )

    def _head_input(self, rows: Tensor, x: Tensor) -> None:
        """Divide lm_head's input, not the logits: what adapters add to the logits is divided with them."""
        super()._head_input(rows, x)
        if self.config.traits.logits_divisor != 1.0:
            x.div_(self.config.traits.logits_divisor)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Cap the logits."""
        cap = self.config.traits.logits_softcap
        if cap is None:
            return logits
        added = logits[:, self.config.vocab_size :]
        is_none = added.isneginf() if added.shape[1] else None
        logits.div_(cap).tanh_().mul_(cap)
        if is_none is not None:
            added.masked_fill_(is_none, float("-inf"))
        return logits
