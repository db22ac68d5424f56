"""Qwen3: Llama with a norm on each head of q and k, and a window in some layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.architectures.entries import windows_by_layer
from loraplex_common.architectures.llama_like import read_llama_like

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k, v and o."""
    bias = values.flag("attention_bias")
    return read_llama_like(values, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=windows_by_layer)
