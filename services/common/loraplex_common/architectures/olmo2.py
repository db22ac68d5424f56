"""OLMo 2: Llama with norms behind attention and MLP in the place of those before them, and norms of q and k over all heads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_common.architectures.entries import no_windows, rope_parameters
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import OLMO2_DECODER, DenseTraits

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig


def read(
    values: ConfigValues,
    *,
    rope: Callable[[ConfigValues, int], dict[str, Any]] = rope_parameters,
    windows: Callable[[ConfigValues, int], Windows] = no_windows,
) -> ModelConfig:
    """Read config.json: ``attention_bias`` is about q, k, v and o; other arguments are those of `read_llama_like`."""
    bias = values.flag("attention_bias")
    config = read_llama_like(
        values, qkv_bias=bias, o_bias=bias, qk_norm=True, rms_norm_eps=1e-5, rope=rope, windows=windows
    )
    traits = DenseTraits(
        before_attention=None,
        after_attention="post_attention_layernorm.weight",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm.weight",
        norms_whole_qk=True,
    )
    return replace(config, decoder=OLMO2_DECODER, traits=traits)
