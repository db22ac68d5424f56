"""What this engine makes of a base model's numbers, known before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.numerics import Numerics

from loraplex_engine.model.rope import has_long_factors

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig


def numerics_of(config: ModelConfig, weights: str, *, dtype: str, max_model_len: int, kv: str = "") -> Numerics:
    """Return an engine's numerics.

    Args:
        config: The decoder.
        weights: What loading does to its weights, as `weight_form.weights_numerics` has it.
        dtype: torch's name of the type computed in.
        max_model_len: Longest sequence that is served: longrope picks its factors by it.
        kv: What keys and values are stored as; empty: in `dtype`.
    """
    rope = "long" if any(has_long_factors(each, max_model_len) for each in config.ropes) else ""
    return Numerics(compute=dtype, weights=weights, kv=kv, rope=rope)
