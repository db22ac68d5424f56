"""OLMo 3: OLMo 2 with windows in three of four layers, which keep the unscaled RoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_common.architectures import olmo2
from loraplex_common.architectures.entries import FULL, SLIDING, windows_of_types
from loraplex_common.architectures.layer_ropes import rope_of_layer, ropes_by_type
from loraplex_common.decoder_config import OLMO3_DECODER

if TYPE_CHECKING:
    from loraplex_common.architectures.entries import Windows
    from loraplex_common.architectures.layer_ropes import Ropes
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

DEFAULT_ROPE_THETA = 500_000.0


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k, v and o."""
    config = olmo2.read(values, rope=lambda values, length: _ropes(values, length)[0], windows=_windows)
    local = _ropes(values, config.max_position_embeddings)[1]
    traits = replace(config.traits, more_ropes=(local,), rope_of_layer=rope_of_layer(config.windows))
    return replace(config, decoder=OLMO3_DECODER, traits=traits)


def _ropes(values: ConfigValues, max_positions: int) -> Ropes:
    return ropes_by_type(values, max_positions, theta=DEFAULT_ROPE_THETA, local_theta=None, local_key=None)


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    return windows_of_types(values, num_layers, lambda layer: SLIDING if (layer + 1) % 4 else FULL)
