"""Llama 2 and 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.architectures.llama_like import read_llama_like

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k, v and o."""
    bias = values.flag("attention_bias")
    return read_llama_like(values, qkv_bias=bias, o_bias=bias, mlp_bias=values.flag("mlp_bias"))
