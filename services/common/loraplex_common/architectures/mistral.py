"""Mistral: Llama with one sliding window for all layers, and no biases whatever config.json says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.architectures.entries import SLIDING, sliding_window
from loraplex_common.architectures.llama_like import read_llama_like

if TYPE_CHECKING:
    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json."""
    return read_llama_like(values, windows=_windows)


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    layer_types = values.texts("layer_types")
    if layer_types and set(layer_types) != {SLIDING}:
        raise values.unserved("layer_types", "all layers of a Mistral model have the window")
    return (sliding_window(values),) * num_layers
