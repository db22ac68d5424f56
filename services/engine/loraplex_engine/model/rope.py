"""Rotary position embedding: the frequencies of each scaling rule, and a table of cosines and sines.

Sources: Su et al., "RoFormer", arXiv:2104.09864; Peng et al., "YaRN", arXiv:2309.00071 (yarn, section 3); Meta's
Llama 3.1 reference code (llama3); Ding et al., "LongRoPE", arXiv:2402.13753 (longrope). Half-split convention: dimension i pairs with i + head_dim / 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from loraplex_common.base_model import BaseModelError
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig


def _llama3_frequencies(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Keep short wavelengths, stretch long ones by ``factor``, and blend in between."""
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth: Tensor = ((length * inv_freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    factor: float = rope["factor"]
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _yarn_frequencies(inv_freq: Tensor, rope: dict[str, Any], dim: int) -> Tensor:
    """Interpolate dimensions that turn less than beta_slow times in the trained length, keep those above beta_fast."""
    theta, length = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension_of(num_rotations: float) -> float:
        return dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # both ends may fall on one dimension
    ramp: Tensor = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    factor: float = rope["factor"]
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    """Return YaRN's factor on cosines and sines, which raises the softmax temperature for long contexts."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def has_long_factors(config: ModelConfig, num_positions: int) -> bool:
    """Return whether longrope divides by its factors for long sequences, because one of that length is served."""
    return any(_is_long(rope, num_positions) for rope in config.ropes)


def _is_long(rope: dict[str, Any], num_positions: int) -> bool:
    return rope["rope_type"] == "longrope" and num_positions > int(rope["original_max_position_embeddings"])


def _longrope(inv_freq: Tensor, config: ModelConfig, rope: dict[str, Any], num_positions: int) -> tuple[Tensor, float]:
    """Divide by the factors for the longest sequence that is served: those for long ones if training saw none as long."""
    trained = rope["original_max_position_embeddings"]
    factors = torch.tensor(rope["long_factor" if _is_long(rope, num_positions) else "short_factor"])
    factor = rope.get("factor") or config.max_position_embeddings / trained
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return inv_freq / factors, float(attention_factor)


def rope_frequencies(config: ModelConfig, num_positions: int, index: int = 0) -> tuple[Tensor, float]:
    """Return the inverse frequencies, fp32 ``[rotary_dim / 2]``, and the factor on cosines and sines.

    Args:
        config: The decoder.
        num_positions: Longest sequence that is served, in tokens: the length that longrope picks its factors by.
        index: Which of the decoder's RoPEs: an entry of `ModelConfig.ropes`.
    """
    rope, dim = config.ropes[index], config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inv_freq = 1.0 / (rope["rope_theta"] ** exponents)
    match rope["rope_type"]:
        case "linear":
            return inv_freq / rope["factor"], 1.0
        case "llama3":
            return _llama3_frequencies(inv_freq, rope), 1.0
        case "yarn":
            return _yarn_frequencies(inv_freq, rope, dim), _yarn_attention_factor(rope)
        case "longrope":
            return _longrope(inv_freq, config, rope, num_positions)
    return inv_freq, 1.0


def rope_table(config: ModelConfig, num_positions: int, index: int = 0) -> Tensor:
    """Tabulate one of the decoder's RoPEs: fp32 ``[num_positions, 2, rotary_dim / 2]``, cosines then sines.

    Raises:
        BaseModelError: If the dynamic rule is asked for positions beyond training, where it would change the
            frequencies of keys that are already in the pool.
    """
    if config.ropes[index]["rope_type"] == "dynamic" and num_positions > config.max_position_embeddings:
        raise BaseModelError(
            f"dynamic RoPE is served up to max_position_embeddings = {config.max_position_embeddings} tokens, "
            f"not {num_positions}: lower --max-model-len"
        )
    inv_freq, factor = rope_frequencies(config, num_positions, index)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return torch.stack((angles.cos() * factor, angles.sin() * factor), dim=1)


def query_scale_table(config: ModelConfig, num_positions: int) -> Tensor | None:
    """Tabulate the factor of the queries by position: fp32 ``[num_positions]``; None if it is always 1."""
    scaling = config.traits.query_scaling
    if scaling is None:
        return None
    return 1 + scaling.beta * torch.log1p(torch.arange(num_positions) // scaling.length)
