"""Granite 4, dense: Granite 3 with fused gate and up under other names, possibly without RoPE; hybrid and expert ones are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_common.architectures import granite
from loraplex_common.architectures.entries import num_hidden_layers
from loraplex_common.projections import with_fused

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues
    from loraplex_common.decoder_config import ModelConfig

ATTENTION: Final = ("attention", "full_attention")
"""Types of a layer that has attention, in either spelling; other layers are Mamba's."""
OF_MAMBA: Final = (
    *("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand"),
    *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit", "time_step_min", "time_step_max"),
    "time_step_floor",
)
OF_EXPERTS: Final = ("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
DEFAULT_MLP: Final = 1024


def read(values: ConfigValues) -> ModelConfig:
    """Read config.json: the MLP is what other models of the family have beside their experts.

    Raises:
        BaseModelError: Likewise, if there are experts or Mamba's layers.
    """
    _refuse_hybrids(values, num_hidden_layers(values))
    values.without_effect(*OF_MAMBA, *OF_EXPERTS, "intermediate_size", "normalization_function", "init_method")
    width = values.integer("shared_intermediate_size", DEFAULT_MLP)
    config = granite.read(values.with_value("intermediate_size", width).with_value("layer_types", None))
    traits = config.traits if _has_rope(values) else replace(config.traits, rotary_layers=(False,) * config.num_layers)
    layers = tuple(
        tuple(
            replace(each, path="shared_mlp.output_linear") if each.op == "down" else each
            for each in with_fused(layer, "gate_up", "shared_mlp.input_linear")
        )
        for layer in config.layers
    )
    return replace(config, layers=layers, mlp_bias=False, traits=traits)


def _refuse_hybrids(values: ConfigValues, num_layers: int) -> None:
    if values.integer("num_local_experts", 8, least=0):
        raise values.unserved("num_local_experts", "only 0 is", "serve a model of the family without experts")
    key = "layers_block_type" if values.has("layers_block_type") and not values.has("layer_types") else "layer_types"
    layer_types = values.texts(key) or ["mamba"] * num_layers
    if set(layer_types) - set(ATTENTION):
        raise values.unserved(key, "only attention is", "serve a model of the family whose layers are all attention")
    if len(layer_types) != num_layers:
        raise values.wrong(key, f"expected {num_layers} of {ATTENTION[0]}")


def _has_rope(values: ConfigValues) -> bool:
    key = "position_embedding_type"
    kind = values.text(key, "nope") if values.has(key) else "nope"
    if kind not in ("rope", "nope"):
        raise values.unserved(key, "only rope, nope and null are")
    return kind == "rope"
