"""SmolLM3: Llama with layers that have no RoPE, and with windows in those if config.json asks for them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.architectures.entries import FULL, SLIDING, rope_parameters
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import SMOLLM3_DECODER, DenseTraits

if TYPE_CHECKING:
    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

DEFAULT_INTERVAL = 4
DEFAULT_ROPE_THETA = 2_000_000.0


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k, v and o."""
    # What one of these says is of no effect beside another, as in transformers.
    values.without_effect("no_rope_layer_interval", "sliding_window", "layer_types")
    bias = values.flag("attention_bias")
    config = read_llama_like(
        values,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
        tied_embeddings=True,
        rope=partial(rope_parameters, default_theta=DEFAULT_ROPE_THETA),
        windows=_windows,
    )
    return replace(
        config,
        decoder=SMOLLM3_DECODER,
        traits=DenseTraits(rotary_layers=_rotary_layers(values, config.num_layers)),
    )


def _rotary_layers(values: ConfigValues, num_layers: int) -> tuple[bool, ...]:
    """Return which layers have RoPE: ``no_rope_layers`` says 1 of those, or every so many layers lacks it."""
    flags = values.integers("no_rope_layers")
    if flags is None:
        interval = values.integer("no_rope_layer_interval", DEFAULT_INTERVAL)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(flags) < num_layers or set(flags) - {0, 1}:
        raise values.wrong("no_rope_layers", f"expected {num_layers} of 0 and 1")
    return tuple(bool(flag) for flag in flags[:num_layers])


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    if not values.flag("use_sliding_window") or not values.has("sliding_window"):
        return (None,) * num_layers
    layer_types = values.texts("layer_types")
    if layer_types is None:
        layer_types = [FULL if rotates else SLIDING for rotates in _rotary_layers(values, num_layers)]
    if set(layer_types) - {SLIDING, FULL} or len(layer_types) != num_layers:
        raise values.wrong("layer_types", f"expected {num_layers} of {SLIDING} and {FULL}")
    window = values.integer("sliding_window")
    return tuple(window if kind == SLIDING else None for kind in layer_types)
