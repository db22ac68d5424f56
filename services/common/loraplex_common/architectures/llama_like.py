"""What the architectures like Llama have in common: attention, then a gated MLP, each behind a norm, seven projections.

An architecture that differs from Llama only in the arguments of `read_llama_like` needs nothing in the engine: one file
beside this one and one line in `registry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.architectures.entries import (
    head_dim,
    no_windows,
    num_hidden_layers,
    num_kv_heads,
    rope_parameters,
)
from loraplex_common.decoder_config import ModelConfig, WeightNames
from loraplex_common.projections import embedding_and_head, gated_decoder_layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.projections import LayerProjections

SILU: Final = ("silu", "swish")
"""Names of the activation; an absent key means the first."""
DEFAULT_MAX_POSITIONS: Final = 2048


def read_llama_like(
    values: ConfigValues,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    rms_norm_eps: float = 1e-6,
    tied_embeddings: bool = False,
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", SILU),
    rope: Callable[[ConfigValues, int], dict[str, Any]] = rope_parameters,
    windows: Callable[[ConfigValues, int], Windows] = no_windows,
) -> ModelConfig:
    """Read config.json.

    Args:
        values: Its entries.
        qkv_bias: As in `ModelConfig`.
        o_bias: Likewise.
        mlp_bias: Likewise.
        qk_norm: Likewise.
        rms_norm_eps: What an absent ``rms_norm_eps`` means.
        tied_embeddings: What an absent ``tie_word_embeddings`` means.
        activation: The key of the MLP's activation, and what it may be; an absent one means the first.
        rope: Reads RoPE's parameters from the entries and the longest trained sequence.
        windows: Reads each layer's window from the entries and the number of layers.

    Raises:
        BaseModelError: If it asks for something this decoder does not compute, or an entry is missing, null or of the
            wrong type; the message names it.
    """
    _check(values, *activation)
    num_layers, num_heads = num_hidden_layers(values), values.integer("num_attention_heads")
    max_positions = values.integer("max_position_embeddings", DEFAULT_MAX_POSITIONS)
    hidden, intermediate = values.integer("hidden_size"), values.integer("intermediate_size")
    kv_heads, dim = num_kv_heads(values, num_heads), head_dim(values, num_heads)
    layer = gated_decoder_layer(
        hidden_size=hidden, intermediate_size=intermediate, num_heads=num_heads, num_kv_heads=kv_heads, head_dim=dim
    )
    return ModelConfig(
        layers=(layer,) * num_layers,
        outside=_outside(values.integer("vocab_size"), hidden),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        vocab_size=values.integer("vocab_size"),
        rms_norm_eps=values.number("rms_norm_eps", rms_norm_eps),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_embeddings=values.flag("tie_word_embeddings", default=tied_embeddings),
        windows=windows(values, num_layers),
        rope=rope(values, max_positions),
        max_position_embeddings=max_positions,
    )


def _check(values: ConfigValues, activation: str, activations: tuple[str, ...]) -> None:
    if values.text(activation, activations[0]) not in activations:
        raise values.unserved(activation, f"only {' and '.join(activations)} {'are' if len(activations) > 1 else 'is'}")
    for flag in ("attention_bias", "mlp_bias"):
        values.flag(flag)  # one that is no flag is refused by architectures that ignore it, too


def _outside(vocab_size: int, hidden_size: int) -> LayerProjections:
    names = WeightNames()
    return embedding_and_head(vocab_size, hidden_size, embedding=names.embedding_module, lm_head=names.lm_head)
