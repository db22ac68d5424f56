"""What a decoder is, once an architecture of `loraplex_common.architectures` has read it from config.json.

Differences between architectures that one decoder of the engine computes are values here, not classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_common.projections import LayerProjections

LLAMA_DECODER: Final = "llama"
"""The engine's decoder of Llama, Mistral, Qwen2, Qwen3 and whatever differs from them in values of `ModelConfig` only."""
GRANITE_DECODER: Final = "granite"
OLMO2_DECODER: Final = "olmo2"
SMOLLM3_DECODER: Final = "smollm3"
GLM4_DECODER: Final = "glm4"
PHI3_DECODER: Final = "phi3"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """Names of a decoder's tensors in its files; the defaults are those of Llama, which most families share.

    Names of other norms are values of `DenseTraits`.

    Attributes:
        lm_head: The linear layer; ``.weight`` follows, as it follows a projection's path.
        layer: What the names of a layer's tensors begin with; ``{layer}`` is the layer's number. A projection's path or
            the name of a norm follows.
    """

    embedding: str = "model.embed_tokens.weight"
    lm_head: str = "lm_head"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"
    post_norm: str = "post_attention_layernorm.weight"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"

    @property
    def embedding_module(self) -> str:
        """Path of the embedding's module."""
        return self.embedding.removesuffix(".weight")

    def in_layer(self, layer: int, name: str) -> str:
        """Return the full name of a tensor or module of one layer."""
        return self.layer.format(layer=layer) + name


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTraits:
    """What distinguishes a dense decoder that Llama's does not compute; the defaults are Llama's.

    Attributes:
        before_attention: Name of the norm of attention's input within a layer; None if the layer has none.
        after_attention: Likewise, of attention's output, before it is added to the residual stream.
        before_mlp: Likewise, of the MLP's input.
        after_mlp: Likewise, of the MLP's output.
        norms_whole_qk: Whether q and k are normalised over all their heads at once, not each head by itself (OLMo 2).
        rotary_layers: Per layer, whether it has RoPE; empty if all have.
        rotary_dim: How many of the first dimensions of a head RoPE rotates; None is all.
        interleaved: Whether RoPE pairs dimensions 2i and 2i + 1, not i and i + rotary_dim / 2.
        embedding_multiplier: Factor of the embeddings.
        residual_multiplier: Factor of what attention and MLP add to the residual stream.
        attention_scale: Factor of attention scores; None is 1 / sqrt(head_dim).
        logits_divisor: What the logits are divided by.
    """

    before_attention: str | None = "input_layernorm.weight"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm.weight"
    after_mlp: str | None = None
    norms_whole_qk: bool = False
    rotary_layers: tuple[bool, ...] = ()
    rotary_dim: int | None = None
    interleaved: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    logits_divisor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder: its shape and the features in which architectures differ.

    Attributes:
        decoder: Which of the engine's decoders computes it: a key of `loraplex_engine.model.registry.DECODERS`.
        layers: The projections of each layer: what its dense products are, and what it offers to adapters.
        outside: What lies outside of the layers and offers itself to adapters: the embedding and lm_head.
        names: Names of the tensors.
        traits: How it differs from Llama's; all defaults for ``LLAMA_DECODER``, which reads none of them.
        qkv_bias: Whether q, k and v have biases; ``o_bias`` and ``mlp_bias`` likewise.
        qk_norm: Whether each head of q and k is normalised before RoPE (Qwen3).
        tied_embeddings: Whether lm_head is the embedding where the files bring only one of them, or two equal ones.
        windows: Per layer, how many of the last tokens it attends to, itself included; None is all.
        rope: RoPE parameters in the spelling of transformers 5: ``rope_type``, ``rope_theta`` and what the type needs.
        max_position_embeddings: Longest sequence the model was trained for, in tokens.
    """

    decoder: str = LLAMA_DECODER
    layers: tuple[LayerProjections, ...]
    outside: LayerProjections = ()
    names: WeightNames = field(default_factory=WeightNames)
    traits: DenseTraits = field(default_factory=DenseTraits)
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
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return self.head_dim if self.traits.rotary_dim is None else self.traits.rotary_dim

    @property
    def attention_scale(self) -> float:
        """Factor of attention scores."""
        scale = self.traits.attention_scale
        return 1 / math.sqrt(self.head_dim) if scale is None else scale
