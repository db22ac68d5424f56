"""What a decoder of the Llama family needs of config.json; differences between models are values here, not classes.

Every service reads a model through this, so that what cannot be served is refused before any of them starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.config_values import BaseModelError, ConfigValues
from loraplex_common.projections import Projection, Split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.projections import LayerProjections

ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ACTIVATIONS: Final = ("silu", "swish")
ROPE_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Served RoPE types, and the numbers that each cannot do without."""
ROPE_OPTIONS: Final = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Numbers of yarn that may be absent or null."""
DEFAULT_ROPE_THETA: Final = 10000.0
DEFAULT_MAX_POSITIONS: Final = 2048
QUANTISATION_KEYS: Final = ("quantization_config", "compression_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder: its shape and the features in which architectures differ.

    Attributes:
        qkv_bias: Whether q, k and v have biases; ``o_bias`` and ``mlp_bias`` likewise.
        qk_norm: Whether each head of q and k is normalised before RoPE (Qwen3).
        tied_embeddings: Whether lm_head is the embedding where the files bring only one of them, or two equal ones.
        windows: Per layer, how many of the last tokens it attends to, itself included; None is all.
        rope: RoPE parameters in the spelling of transformers 5: ``rope_type``, ``rope_theta`` and what the type needs.
        max_position_embeddings: Longest sequence the model was trained for, in tokens.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    rope: dict[str, Any]
    max_position_embeddings: int

    @property
    def layers(self) -> tuple[LayerProjections, ...]:
        """What each layer offers to adapters."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = (
            Projection("self_attn.q_proj", "qkv", self.hidden_size, query),
            Projection("self_attn.k_proj", "qkv", self.hidden_size, key_value),
            Projection("self_attn.v_proj", "qkv", self.hidden_size, key_value),
            Projection("self_attn.o_proj", "o", query, self.hidden_size, Split.INPUTS),
            Projection("mlp.gate_proj", "gate_up", self.hidden_size, self.intermediate_size),
            Projection("mlp.up_proj", "gate_up", self.hidden_size, self.intermediate_size),
            Projection("mlp.down_proj", "down", self.intermediate_size, self.hidden_size, Split.INPUTS),
        )
        return (layer,) * self.num_layers


def model_config(config: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
    """Read a model's architecture out of its config.json.

    Args:
        config: config.json as read.
        file: Named in messages.

    Raises:
        BaseModelError: If it asks for something this decoder does not compute, or an entry is missing, null or of the
            wrong type; the message names it.
    """
    values = ConfigValues(config, file)
    architecture = _architecture(config, file)
    _refuse_quantised(config, file)
    activation = values.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise BaseModelError(f"{file}: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    num_layers, num_heads = values.integer("num_hidden_layers"), values.integer("num_attention_heads")
    max_positions = values.integer("max_position_embeddings", DEFAULT_MAX_POSITIONS)
    attention_bias = values.flag("attention_bias") and architecture != "MistralForCausalLM"
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=values.integer("hidden_size"),
        intermediate_size=values.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(values, num_heads),
        head_dim=_head_dim(values, num_heads),
        vocab_size=values.integer("vocab_size"),
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias and not is_qwen2,
        mlp_bias=values.flag("mlp_bias") and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=values.flag("tie_word_embeddings"),
        windows=_windows(architecture, values, num_layers),
        rope=_rope_parameters(values, max_positions, file),
        max_position_embeddings=max_positions,
    )


def _architecture(config: Mapping[str, Any], file: str) -> str:
    named = config.get("architectures")
    served = [name for name in named if name in ARCHITECTURES] if isinstance(named, list) else []
    if not served:
        raise BaseModelError(
            f"{file}: architecture {named} is not one of {', '.join(ARCHITECTURES)}; serve a model of one of these"
        )
    return str(served[0])


def _refuse_quantised(config: Mapping[str, Any], file: str) -> None:
    for key in QUANTISATION_KEYS:
        if (settings := config.get(key)) is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise BaseModelError(
                f"{file}: {key}{f' ({method})' if method else ''}: quantised weights are not served; serve the model "
                "that was quantised, or remove the entry if the weights are whole"
            )


def _num_kv_heads(values: ConfigValues, num_heads: int) -> int:
    num = values.integer("num_key_value_heads") if values.has("num_key_value_heads") else num_heads
    if num_heads % num:
        raise values.wrong("num_key_value_heads", f"expected a divisor of num_attention_heads = {num_heads}")
    return num


def _head_dim(values: ConfigValues, num_heads: int) -> int:
    if not values.has("head_dim"):
        hidden_size = values.integer("hidden_size")
        if hidden_size % num_heads or hidden_size // num_heads % 2:
            raise values.wrong("head_dim", f"hidden_size {hidden_size} over {num_heads} heads is no even number")
        return hidden_size // num_heads
    dim = values.integer("head_dim")
    if dim % 2:
        raise values.wrong("head_dim", "expected an even number")
    return dim


def _windows(architecture: str, values: ConfigValues, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window. Llama has none; Mistral one for all layers; Qwen's depends on the layer."""
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    layer_types = values.texts("layer_types")
    if architecture == "MistralForCausalLM":
        if layer_types and set(layer_types) != {"sliding_attention"}:
            raise values.unserved("layer_types", "all layers of a Mistral model have the window")
        return (_window(values),) * num_layers
    if not values.flag("use_sliding_window") or (window := _window(values)) is None:
        return (None,) * num_layers
    if layer_types is None:
        first = values.integer("max_window_layers", 28, least=0)
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if set(layer_types) - {"sliding_attention", "full_attention"} or len(layer_types) != num_layers:
        raise values.wrong("layer_types", f"expected {num_layers} of sliding_attention and full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _window(values: ConfigValues) -> int | None:
    """Return the window: 4096, what transformers assumes, if the key is absent; none for null."""
    if values.has("sliding_window"):
        return values.integer("sliding_window")
    return 4096 if values.is_absent("sliding_window") else None


def _rope_parameters(values: ConfigValues, max_positions: int, file: str) -> dict[str, Any]:
    """Return RoPE parameters from either spelling of config.json.

    transformers 5 writes one ``rope_parameters``; before, there were ``rope_theta`` and ``rope_scaling`` with ``type``
    or ``rope_type``.
    """
    rope = values.section("rope_parameters") or values.section("rope_scaling") or ConfigValues({}, file)
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
    if kind not in ROPE_NEEDS:
        raise BaseModelError(f"{file}: RoPE type {kind!r} is not one of {', '.join(ROPE_NEEDS)}")
    if nested := rope.nested():
        raise BaseModelError(f"{file}: RoPE parameters per layer type ({', '.join(nested)}) are not served")
    for owner in (rope, values):
        if owner.has("partial_rotary_factor") and owner.number("partial_rotary_factor") != 1.0:
            raise owner.unserved("partial_rotary_factor", "only 1.0 is")
    theta = rope if rope.has("rope_theta") else values
    length = "original_max_position_embeddings"
    read: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": theta.number("rope_theta", DEFAULT_ROPE_THETA, above=1.0),
        length: rope.integer(length) if rope.has(length) else max_positions,
        "truncate": rope.flag("truncate", default=True),
    }
    read |= {key: rope.number(key) for key in ROPE_NEEDS[kind]}
    read |= {key: rope.number(key) for key in ROPE_OPTIONS if kind == "yarn" and rope.has(key)}
    if kind == "llama3" and read["high_freq_factor"] <= read["low_freq_factor"]:
        raise rope.wrong("high_freq_factor", "expected more than low_freq_factor")
    return read
