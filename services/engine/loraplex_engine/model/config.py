"""What a decoder of the Llama family needs of config.json; differences between models are values here, not classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.base_model import ARCHITECTURES, BaseModelError

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo

ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")
ACTIVATIONS: Final = ("silu", "swish")
DEFAULT_ROPE_THETA: Final = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder: its shape and the features in which architectures differ.

    Attributes:
        qkv_bias: Whether q, k and v have biases; ``o_bias`` and ``mlp_bias`` likewise.
        qk_norm: Whether each head of q and k is normalised before RoPE (Qwen3).
        tied_embeddings: Whether lm_head is the embedding.
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


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters from either spelling of config.json.

    transformers 5 writes one ``rope_parameters``; before, there were ``rope_theta`` and ``rope_scaling`` with ``type``
    or ``rope_type``.

    Raises:
        BaseModelError: If the type is not one of `ROPE_TYPES`, or only a part of a head is rotated.
    """
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise BaseModelError(f"config.json: RoPE type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise BaseModelError(f"config.json: RoPE parameters per layer type ({', '.join(nested)}) are not served")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise BaseModelError(f"config.json: partial_rotary_factor {partial} is not served, only 1.0")
    theta = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROPE_THETA
    length = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 2048
    return rope | {"rope_type": kind, "rope_theta": float(theta), "original_max_position_embeddings": int(length)}


def _windows(architecture: str, config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window. Llama has none; Mistral one for all layers; Qwen's depends on the layer."""
    window = config.get("sliding_window", 4096)  # what transformers assumes if the key is absent
    layer_types = config.get("layer_types")
    if architecture == "MistralForCausalLM":
        if layer_types and set(layer_types) != {"sliding_attention"}:
            raise BaseModelError("config.json: layer_types of a Mistral model are not served")
        return (window,) * num_layers
    if architecture == "LlamaForCausalLM" or window is None or not config.get("use_sliding_window", False):
        return (None,) * num_layers
    if layer_types is None:
        first = int(config.get("max_window_layers", 28))
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    unknown = set(layer_types) - {"sliding_attention", "full_attention"}
    if unknown or len(layer_types) != num_layers:
        raise BaseModelError(
            f"config.json: layer_types {sorted(set(layer_types))} for {num_layers} layers is not served"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def model_config(info: BaseModelInfo) -> ModelConfig:
    """Read a model's architecture out of its config.json.

    Raises:
        BaseModelError: If it asks for something this decoder does not compute; the message names it.
    """
    config = info.config
    architecture = next(name for name in config["architectures"] if name in ARCHITECTURES)
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise BaseModelError(f"config.json: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if config.get("quantization_config"):
        raise BaseModelError("config.json: quantization_config: quantised weights are not served")
    attention_bias = bool(config.get("attention_bias", False)) and architecture != "MistralForCausalLM"
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    return ModelConfig(
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        intermediate_size=info.intermediate_size,
        num_heads=info.num_heads,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        vocab_size=info.vocab_size,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias and not is_qwen2,
        mlp_bias=bool(config.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        windows=_windows(architecture, config, info.num_layers),
        rope=rope_parameters(config),
        max_position_embeddings=info.max_position_embeddings,
    )
