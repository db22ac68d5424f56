"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, whatever config.json says, and a window in some layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.architectures.entries import windows_by_layer
from loraplex_common.architectures.llama_like import read_llama_like

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json."""
    return read_llama_like(values, qkv_bias=True, windows=windows_by_layer)
