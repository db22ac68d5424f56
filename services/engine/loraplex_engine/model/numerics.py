"""What this engine makes of a base model's numbers, known before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.numerics import WHOLE, Numerics

from loraplex_engine.model.rope import has_long_factors

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig
    from loraplex_common.stored_forms.quantisation import Quantisation


def weights_numerics(quantisation: Quantisation | None) -> str:
    """Return what loading does to the weights of a checkpoint, in a word: the part `Numerics.weights`."""
    return WHOLE if quantisation is None else f"unpacked:{quantisation.method}"


def numerics_of(
    config: ModelConfig, quantisation: Quantisation | None, *, dtype: str, max_model_len: int, kv: str = ""
) -> Numerics:
    """Return an engine's numerics.

    Args:
        config: The decoder.
        quantisation: How its checkpoint stores weights; None if they are whole.
        dtype: torch's name of the type computed in.
        max_model_len: Longest sequence that is served: longrope picks its factors by it.
        kv: What keys and values are stored as; empty: in `dtype`.
    """
    rope = "long" if any(has_long_factors(each, max_model_len) for each in config.ropes) else ""
    return Numerics(compute=dtype, weights=weights_numerics(quantisation), kv=kv, rope=rope)
