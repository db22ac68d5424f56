"""The decoder of the Llama family: Llama 2/3, Mistral, Qwen2/2.5, Qwen3, told apart by `ModelConfig` alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_engine.model.decoder_model import DecoderModel
from loraplex_engine.model.layers import RmsNorm
from loraplex_engine.model.linear import Linear

if TYPE_CHECKING:
    from loraplex_engine.model.decoder_model import LayerReader


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer; q_norm and k_norm only where the architecture has them."""

    input_norm: RmsNorm
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    o: Linear
    post_norm: RmsNorm
    gate_up: Linear
    down: Linear


class LlamaModel(DecoderModel[DecoderLayer]):
    """Attention, then a gated MLP, each behind a norm and added to the residual stream."""

    def _read_layer(self, reader: LayerReader) -> DecoderLayer:
        config, names = reader.config, reader.config.names
        return DecoderLayer(
            input_norm=reader.norm(names.input_norm, config.hidden_size),
            qkv=reader.linear("qkv", has_bias=config.qkv_bias),
            q_norm=reader.norm(names.q_norm, config.head_dim) if config.qk_norm else None,
            k_norm=reader.norm(names.k_norm, config.head_dim) if config.qk_norm else None,
            o=reader.linear("o", has_bias=config.o_bias),
            post_norm=reader.norm(names.post_norm, config.hidden_size),
            gate_up=reader.linear("gate_up", has_bias=config.mlp_bias),
            down=reader.linear("down", has_bias=config.mlp_bias),
        )
