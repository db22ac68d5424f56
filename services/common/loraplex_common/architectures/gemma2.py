"""Gemma 2, and what Gemma 3 has in common with it: norms around attention and MLP, GELU, scaled embeddings, local layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.architectures.entries import FULL, SLIDING, rope_parameters, windows_of_types
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import GEMMA_DECODER, DenseTraits

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

GELU_TANH: Final = ("gelu_pytorch_tanh",)
DEFAULTS: Final[dict[str, object]] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
"""What absent keys mean that every other architecture needs, or reads otherwise."""


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: an absent cap is one, null is none."""
    defaults = {"vocab_size": 256000, "max_position_embeddings": 8192}
    values = values.with_defaults({**defaults, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    config = read_gemma(values, rope=rope_parameters, windows=_windows)
    return replace(config, traits=replace(config.traits, score_softcap=_cap(values, "attn_logit_softcapping")))


def read_gemma(
    values: ConfigValues,
    *,
    qk_norm: bool = False,
    rope: Callable[[ConfigValues, int], dict[str, Any]],
    windows: Callable[[ConfigValues, int], Windows],
) -> ModelConfig:
    """Read config.json of a Gemma model; arguments as those of `read_llama_like`.

    ``hidden_act``, which old files have beside ``hidden_activation``, means nothing.
    """
    values = values.with_defaults(DEFAULTS)
    values.without_effect("hidden_act", "sliding_window_size")
    if values.flag("use_bidirectional_attention"):
        raise values.unserved("use_bidirectional_attention", "a token attends to earlier ones only")
    bias = values.flag("attention_bias")
    config = read_llama_like(
        values,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=qk_norm,
        tied_embeddings=True,
        activation=("hidden_activation", GELU_TANH),
        rope=rope,
        windows=windows,
    )
    traits = DenseTraits(
        after_attention="post_attention_layernorm.weight",
        before_mlp="pre_feedforward_layernorm.weight",
        after_mlp="post_feedforward_layernorm.weight",
        norm_offset=1.0,
        activation="gelu_tanh",
        embedding_multiplier=math.sqrt(config.hidden_size),
        rounds_embedding_multiplier=True,
        attention_scale=1 / math.sqrt(values.number("query_pre_attn_scalar")),
        logits_softcap=_cap(values, "final_logit_softcapping"),
    )
    return replace(config, decoder=GEMMA_DECODER, traits=traits)


def _cap(values: ConfigValues, key: str) -> float | None:
    return values.number(key) if values.has(key) else None


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    """Return the windows; unless the file says otherwise, every other layer has one, from the first on."""
    return windows_of_types(values, num_layers, lambda layer: FULL if layer % 2 else SLIDING)
