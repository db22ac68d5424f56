"""Ministral 3: Llama with YaRN and a factor of the queries that grows with their position, and no biases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.architectures.entries import rope_parameters, rope_section
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.decoder_config import MINISTRAL3_DECODER, DenseTraits, QueryScaling

if TYPE_CHECKING:
    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

DEFAULTS: Final = {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 262144}
BETA: Final = "llama_4_scaling_beta"


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json; ``rope_parameters`` has the factor of the queries, too, and must be there."""
    values = values.with_defaults(DEFAULTS)
    config = read_llama_like(values, rms_norm_eps=1e-5, rope=_rope, windows=_windows)
    return replace(
        config, decoder=MINISTRAL3_DECODER, traits=DenseTraits(query_scaling=_query_scaling(values, config.rope))
    )


def _rope(values: ConfigValues, max_positions: int) -> dict[str, Any]:
    if not values.has("rope_parameters") and not values.has("rope_scaling"):
        raise values.wrong("rope_parameters", "expected RoPE's parameters")
    rope_section(values).without_effect("max_position_embeddings")
    return rope_parameters(values, max_positions, 1_000_000.0)


def _query_scaling(values: ConfigValues, rope: dict[str, Any]) -> QueryScaling | None:
    section = rope_section(values)
    if not section.has(BETA) or section.raw(BETA) == 0:
        return None
    return QueryScaling(section.number(BETA), rope["original_max_position_embeddings"])


def _windows(values: ConfigValues, num_layers: int) -> Windows:
    """Return one window for all layers; none if the key is absent, as in transformers."""
    return (values.integer("sliding_window") if values.has("sliding_window") else None,) * num_layers
