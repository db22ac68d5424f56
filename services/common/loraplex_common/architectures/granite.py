"""Granite 3, dense: Llama with factors of embeddings, attention scores, residual stream and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import GRANITE_DECODER, DenseTraits

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: an absent factor is 1, as in transformers, also of attention scores."""
    bias = values.flag("attention_bias")
    config = read_llama_like(values, qkv_bias=bias, o_bias=bias, mlp_bias=values.flag("mlp_bias"))
    traits = DenseTraits(
        embedding_multiplier=values.number("embedding_multiplier", 1.0),
        residual_multiplier=values.number("residual_multiplier", 1.0),
        attention_scale=values.number("attention_multiplier", 1.0),
        logits_divisor=values.number("logits_scaling", 1.0),
    )
    return replace(config, decoder=GRANITE_DECODER, traits=traits)
