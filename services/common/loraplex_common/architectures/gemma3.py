"""Gemma 3, text: Gemma 2 with norms of q and k in the place of a cap of the scores, and a RoPE of its own for local layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.architectures.entries import FULL, SLIDING, windows_of_types
from loraplex_common.architectures.gemma2 import read_gemma
from loraplex_common.architectures.layer_ropes import rope_of_layer, ropes_by_type

if TYPE_CHECKING:
    from loraplex_common.architectures.entries import Windows
    from loraplex_common.architectures.layer_ropes import Ropes
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

DEFAULTS: Final = {"vocab_size": 262208, "max_position_embeddings": 131072}
DEFAULT_PATTERN: Final = 6
DEFAULT_THETA, DEFAULT_LOCAL_THETA = 1_000_000.0, 10_000.0


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json."""
    values = values.with_defaults(DEFAULTS)
    config = read_gemma(values, qk_norm=True, rope=lambda values, length: _ropes(values, length)[0], windows=_windows)
    local = _ropes(values, config.max_position_embeddings)[1]
    traits = replace(config.traits, more_ropes=(local,), rope_of_layer=rope_of_layer(config.windows))
    return replace(config, traits=traits)


def _ropes(values: ConfigValues, max_positions: int) -> Ropes:
    return ropes_by_type(
        values, max_positions, theta=DEFAULT_THETA, local_theta=DEFAULT_LOCAL_THETA, local_key="rope_local_base_freq"
    )


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    """Return the windows; unless the file says otherwise, every so many layers lacks one."""
    pattern: Any = "sliding_window_pattern" if values.has("sliding_window_pattern") else "_sliding_window_pattern"
    every = values.integer(pattern, DEFAULT_PATTERN)
    return windows_of_types(values, num_layers, lambda layer: SLIDING if (layer + 1) % every else FULL)
