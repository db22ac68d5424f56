"""What this engine makes of a base model's numbers, known before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.numerics import Numerics

from loraplex_engine.model.rope import has_long_factors

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig


def numerics_of(
    config: ModelConfig, weights: str, *, dtype: str, max_model_len: int, kv: str = "", tp_degree: int = 1
) -> Numerics:
    """Return an engine's numerics.

    Args:
        config: The decoder.
        weights: What loading does to the weights: see `weights_numerics`.
        dtype: torch's name of the type computed in.
        max_model_len: Longest sequence that is served: longrope picks its factors by it.
        kv: What keys and values are stored as; empty: in `dtype`.
        tp_degree: Tensor-parallel ranks.
    """
    rope = "long" if has_long_factors(config, max_model_len) else ""
    return Numerics(compute=dtype, weights=weights, kv=kv, rope=rope, tp_degree=tp_degree)
