"""What a decoder is, once an architecture of `loraplex_common.architectures` has read it from config.json.

Differences between architectures that one decoder of the engine computes are values here, not classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from loraplex_common.projections import LayerProjections

LLAMA_DECODER: Final = "llama"
"""The engine's decoder of Llama, Mistral, Qwen2, Qwen3 and whatever differs from them in values of `ModelConfig` only."""
GRANITE_DECODER: Final = "granite"
OLMO2_DECODER: Final = "olmo2"
SMOLLM3_DECODER: Final = "smollm3"
GLM4_DECODER: Final = "glm4"
PHI3_DECODER: Final = "phi3"
GEMMA_DECODER: Final = "gemma"
"""Gemma 2 and 3."""
OLMO3_DECODER: Final = "olmo3"
MINISTRAL3_DECODER: Final = "ministral3"

Activation: TypeAlias = Literal["silu", "gelu_tanh"]
"""What an MLP applies to its gate: SiLU, or GELU in its approximation by tanh."""


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


@dataclass(frozen=True, slots=True)
class QueryScaling:
    """Factor of the queries at a position: ``1 + beta * log(1 + floor(position / length))`` (Llama 4, Ministral 3)."""

    beta: float
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTraits:
    """What distinguishes a dense decoder that Llama's does not compute; the defaults are Llama's.

    Attributes:
        before_attention: Name of the norm of attention's input within a layer; None if the layer has none.
        after_attention: Likewise, of attention's output, before it is added to the residual stream.
        before_mlp: Likewise, of the MLP's input.
        after_mlp: Likewise, of the MLP's output.
        norm_offset: Added to the weight of every norm, q's, k's and the last one included (Gemma: 1). The product with the
            weight is rounded to the compute dtype once, behind it.
        norms_whole_qk: Whether q and k are normalised over all their heads at once, not each head by itself (OLMo 2).
        rotary_layers: Per layer, whether it has RoPE; empty if all have.
        more_ropes: RoPE parameters of layers that do not have those of ``ModelConfig.rope``, in its form.
        rope_of_layer: Per layer, its entry of `ModelConfig.ropes`; empty if all have the first.
        rotary_dim: How many of the first dimensions of a head RoPE rotates; None is all.
        interleaved: Whether RoPE pairs dimensions 2i and 2i + 1, not i and i + rotary_dim / 2.
        activation: What the MLP applies to its gate.
        embedding_multiplier: Factor of the embeddings, what adapters add to them or put in their place included.
        rounds_embedding_multiplier: Whether the factor is rounded to the compute dtype first (Gemma).
        residual_multiplier: Factor of what attention and MLP add to the residual stream.
        attention_scale: Factor of attention scores; None is 1 / sqrt(head_dim).
        query_scaling: Factor of the queries by position, behind RoPE; None is 1.
        score_softcap: Scores, after their factor and before the mask, become ``cap * tanh(score / cap)``; None is no cap.
        logits_softcap: Likewise of logits, with what adapters add to them.
        logits_divisor: What the logits are divided by.
    """

    before_attention: str | None = "input_layernorm.weight"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm.weight"
    after_mlp: str | None = None
    norm_offset: float = 0.0
    norms_whole_qk: bool = False
    rotary_layers: tuple[bool, ...] = ()
    more_ropes: tuple[dict[str, Any], ...] = ()
    rope_of_layer: tuple[int, ...] = ()
    rotary_dim: int | None = None
    interleaved: bool = False
    activation: Activation = "silu"
    embedding_multiplier: float = 1.0
    rounds_embedding_multiplier: bool = False
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    query_scaling: QueryScaling | None = None
    score_softcap: float | None = None
    logits_softcap: float | None = None
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
    def ropes(self) -> tuple[dict[str, Any], ...]:
        """All RoPE parameters: ``rope``, then those of other layers."""
        return (self.rope, *self.traits.more_ropes)

    def rope_of(self, layer: int) -> int | None:
        """Return a layer's entry of ``ropes``; None if it has no RoPE."""
        traits = self.traits
        if traits.rotary_layers and not traits.rotary_layers[layer]:
            return None
        return traits.rope_of_layer[layer] if traits.rope_of_layer else 0

    @property
    def attention_scale(self) -> float:
        """Factor of attention scores."""
        scale = self.traits.attention_scale
        return 1 / math.sqrt(self.head_dim) if scale is None else scale
