"""What this engine makes of a base model's numbers, known before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from loraplex_common.numerics import Numerics

from loraplex_engine.model.rope import has_long_factors

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig


class RankForm(NamedTuple):
    """How tensor-parallel ranks share the work.

    Attributes:
        degree: Ranks.
        adapter_split: How they divide adapters' pairs: ``whole``, ``divided``, or ``auto`` for the faster way in each step.
    """

    degree: int = 1
    adapter_split: str = "auto"


ALONE: Final = RankForm()


def numerics_of(
    config: ModelConfig,
    weights: str,
    ranks: RankForm = ALONE,
    *,
    dtype: str,
    max_model_len: int,
    kv: str = "",
) -> Numerics:
    """Return an engine's numerics.

    Args:
        config: The decoder.
        weights: What loading does to the weights: see `weights_numerics`.
        ranks: Tensor-parallel ranks.
        dtype: torch's name of the type computed in.
        max_model_len: Longest sequence that is served: longrope picks its factors by it.
        kv: What keys and values are stored as; empty: in `dtype`.
    """
    rope = "long" if has_long_factors(config, max_model_len) else ""
    pairs = "" if ranks.adapter_split == "auto" else ranks.adapter_split
    return Numerics(compute=dtype, weights=weights, kv=kv, rope=rope, tp_degree=ranks.degree, pairs=pairs)
