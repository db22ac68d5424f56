"""GLM-4 (0414): norms around attention and MLP, fused gate and up, RoPE on pairs side by side in the first half of each head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_common.architectures.entries import rope_parameters, rotary_dim
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import GLM4_DECODER, DenseTraits
from loraplex_common.projections import with_fused

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

DEFAULT_HEAD_DIM: Final = 128
DEFAULT_ROTARY_FACTOR: Final = 0.5
DEFAULT_EPS: Final = 1.5625e-7


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k and v, and true if it is absent."""
    config = read_llama_like(
        values.with_default("head_dim", DEFAULT_HEAD_DIM),
        qkv_bias=values.flag("attention_bias", default=True),
        rms_norm_eps=DEFAULT_EPS,
        rope=partial(rope_parameters, is_partial=True),
    )
    traits = DenseTraits(
        after_attention="post_self_attn_layernorm.weight",
        after_mlp="post_mlp_layernorm.weight",
        rotary_dim=rotary_dim(values, config.head_dim, DEFAULT_ROTARY_FACTOR),
        interleaved=True,
    )
    layers = tuple(with_fused(layer, "gate_up", "mlp.gate_up_proj") for layer in config.layers)
    return replace(config, decoder=GLM4_DECODER, layers=layers, traits=traits)
