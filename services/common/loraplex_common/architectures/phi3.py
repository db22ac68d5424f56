"""Phi-3, Phi-3.5 and Phi-4 (mini): fused q, k and v, fused gate and up, RoPE on a part of each head, longrope."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_common.architectures.entries import rope_parameters, rope_section, rotary_dim
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import PHI3_DECODER, DenseTraits
from loraplex_common.projections import with_fused

if TYPE_CHECKING:
    from typing import Any

    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

ROPE_NEEDS: Final[dict[str, tuple[str, ...]]] = {"default": (), "longrope": ()}
FACTORS: Final = ("short_factor", "long_factor")
"""Lists of longrope, each with a number for every pair of rotated dimensions."""
DEFAULT_TRAINED: Final = 4096
"""What an absent ``original_max_position_embeddings`` means; ``max_position_embeddings`` likewise."""


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json."""
    values = values.with_default("max_position_embeddings", DEFAULT_TRAINED)
    config = read_llama_like(values, rms_norm_eps=1e-5, rope=_rope, windows=_windows)
    traits = DenseTraits(rotary_dim=rotary_dim(values, config.head_dim, 1.0))
    layers = tuple(
        with_fused(with_fused(layer, "qkv", "self_attn.qkv_proj"), "gate_up", "mlp.gate_up_proj")
        for layer in config.layers
    )
    read = replace(config, decoder=PHI3_DECODER, layers=layers, traits=traits)
    for key in (key for key in FACTORS if key in read.rope):
        if len(read.rope[key]) != read.rotary_dim // 2:
            raise values.problem(f"RoPE's {key} has {len(read.rope[key])} numbers, expected {read.rotary_dim // 2}")
    return read


def _rope(values: ConfigValues, max_positions: int) -> dict[str, Any]:
    """Return RoPE parameters: the trained length stands outside of their section."""
    read = rope_parameters(values, max_positions, is_partial=True, kinds=ROPE_NEEDS)
    length = "original_max_position_embeddings"
    read[length] = values.integer(length, DEFAULT_TRAINED)
    if read["rope_type"] == "longrope":
        rope = rope_section(values)
        read |= {key: rope.numbers(key) for key in FACTORS}
        read |= {key: rope.number(key) for key in ("factor", "attention_factor") if rope.has(key)}
    return read


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    """Return one window for all layers; none if the key is absent, as in transformers."""
    return (values.integer("sliding_window") if values.has("sliding_window") else None,) * num_layers
