"""Seed-OSS: Llama with biases on q, k and v unless config.json says otherwise, and a switch of its own for o's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.architectures.llama_like import read_llama_like

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

DEFAULT_HEAD_DIM = 128


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k and v, ``attention_out_bias`` about o."""
    return read_llama_like(
        values.with_default("head_dim", DEFAULT_HEAD_DIM),
        qkv_bias=values.flag("attention_bias", default=True),
        o_bias=values.flag("attention_out_bias"),
        mlp_bias=values.flag("mlp_bias"),
    )
