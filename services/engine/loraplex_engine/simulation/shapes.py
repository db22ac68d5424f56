"""Sizes of base models and adapters, on which a step's time depends besides its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from loraplex_common.adapter_image import ITEM_BYTES, TILE_ALIGN, ImageError, layout, pair_sizes
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelInfo
from loraplex_common.config_values import BaseModelError
from loraplex_common.projections import LayerProjections, gated_decoder_layer

from loraplex_engine.pool_geometry import PoolGeometry, choose_pool_geometry

ATTENTION_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS: Final = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")

# name -> layers, hidden, intermediate, heads, KV heads, head size, vocabulary; from the models' config.json
_KNOWN: Final = {
    "llama2-7b": (32, 4096, 11008, 32, 32, 128, 32000),
    "llama2-13b": (40, 5120, 13824, 40, 40, 128, 32000),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128, 128256),
    "llama3-70b": (80, 8192, 28672, 64, 8, 128, 128256),
    "mistral-7b": (32, 4096, 14336, 32, 8, 128, 32000),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 128, 152064),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 128, 151936),
}
KNOWN_SHAPES: Final = tuple(_KNOWN)
NO_FINGERPRINT: Final = "0" * 64
_OPS: Final = {
    each.name: each.op
    for each in gated_decoder_layer(hidden_size=2, intermediate_size=2, num_heads=1, num_kv_heads=1, head_dim=2)
}
"""Targets -> the products of a layer that they are part of."""


class ShapeError(ValueError):
    """A model or adapter cannot be simulated; the message says what can be."""


def base_model(name: str) -> BaseModelInfo:
    """Return a well-known model's sizes.

    Raises:
        ShapeError: If the name is unknown.
    """
    if name not in _KNOWN:
        raise ShapeError(f"model {name!r} is not one of {', '.join(_KNOWN)}; give its config.json instead")
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = _KNOWN[name]
    return _info(name, layers, hidden, intermediate, heads, kv_heads, head_dim, vocab)


def base_model_from_config(name: str, config: dict[str, Any], *, text_only: bool = False) -> BaseModelInfo:
    """Return the sizes that a Hugging Face ``config.json`` states, as the engine reads it.

    Args:
        name: What the model is called.
        config: Its config.json.
        text_only: Whether a multimodal model means its text part.

    Raises:
        ShapeError: If it is no config.json of a model that is served.
    """
    try:
        shape = model_config(config, f"{name}: config.json", text_only=text_only)
    except BaseModelError as error:
        raise ShapeError(str(error)) from error
    return BaseModelInfo(
        name=name,
        fingerprint=NO_FINGERPRINT,
        aliases=(),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        config=config,
        layers=shape.layers,
    )


def _info(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int
) -> BaseModelInfo:
    layer = gated_decoder_layer(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )
    return BaseModelInfo(
        name=name,
        fingerprint=NO_FINGERPRINT,
        aliases=(),
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=131072,
        config={},
        layers=(layer,) * layers,
    )


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """The cost of one adapter.

    Attributes:
        num_pages: Pages of its image, on each rank.
        weight_bytes: Bytes of A and B that a step with it reads, on each rank.
        traffic_bytes: Bytes of activations that its products read and write per token.
        num_ops: Fused projections of a layer that it adapts.
        num_projections: The same, each projection counted by itself.
    """

    rank: int
    num_pages: int
    weight_bytes: int
    traffic_bytes: int
    num_ops: int
    num_projections: int


@dataclass(frozen=True)
class ModelShape:
    """A base model as the device sees it; with several tensor-parallel ranks, as one of their devices does.

    Attributes:
        info: Its sizes.
        dtype: Type of weights and adapters: ``bfloat16`` or ``float32``; of keys and values, too, unless ``kv_dtype`` says so.
        num_block_tokens: Tokens of a KV page; None for the engine's own choice.
        kv_dtype: Type of keys and values, as `PoolGeometry` has it.
        tp_degree: Tensor-parallel ranks.

    Raises:
        ShapeError: If so many ranks cannot divide the model.
    """

    info: BaseModelInfo
    dtype: str = "bfloat16"
    num_block_tokens: int | None = None
    kv_dtype: str = ""
    tp_degree: int = 1

    def __post_init__(self) -> None:
        try:
            self.info.geometry(dtype=self.dtype, page_bytes=TILE_ALIGN, tp_degree=self.tp_degree)
        except ImageError as error:
            raise ShapeError(f"{self.info.name} over {self.tp_degree} ranks: {error}") from error

    @cached_property
    def pool(self) -> PoolGeometry:
        """Geometry of the pool's pages."""
        degree, kv_dtype = self.tp_degree, self.kv_dtype
        chosen = choose_pool_geometry(self.info, dtype=self.dtype, tp_degree=degree, kv_dtype=kv_dtype)
        return chosen if self.num_block_tokens is None else replace(chosen, block_tokens=self.num_block_tokens)

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def layer_weights(self) -> int:
        """Weights of all layers: each token is multiplied with each of them once."""
        return sum(math.prod(each.local_shape(self.tp_degree)) for layer in self.info.layers for each in layer)

    @cached_property
    def rank_vocabulary(self) -> int:
        """Tokens of which one rank has rows of embedding and head: ranks differ by one, and the largest counts."""
        return -(-self.info.vocab_size // self.tp_degree)

    @cached_property
    def head_weights(self) -> int:
        """Weights of the output head: each sampled row is multiplied with each of them once."""
        return self.rank_vocabulary * self.info.hidden_size

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that every step reads, whatever its batch: what `Linear.weight_bytes` add up to in the engine."""
        return (self.layer_weights + self.head_weights) * self.item_bytes

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, and of their scales."""
        return self.pool.token_bytes

    @cached_property
    def activation_bytes_per_token(self) -> int:
        """Bytes that the pointwise kernels between the products read and write per token."""
        info = self.info
        degree = self.tp_degree
        query, key_value = info.num_heads // degree * info.head_dim, self.pool.num_kv_heads * info.head_dim
        norms = 2 * 4 * info.hidden_size  # residual in and out, x in and out, twice
        rope = 2 * (query + 2 * key_value)
        silu = 3 * (info.intermediate_size // degree)
        return info.num_layers * (norms + rope + silu) * self.item_bytes

    @cached_property
    def attention_flops_per_pair(self) -> int:
        """Floating-point operations of one query with one key, over all layers and heads."""
        return 4 * self.info.num_layers * (self.info.num_heads // self.tp_degree) * self.info.head_dim

    def adapter(self, rank: int, targets: tuple[str, ...] = ATTENTION_TARGETS) -> AdapterSize:
        """Return the size of an adapter of one LoRA rank on ``targets`` of all layers.

        Where the model has fused a target with others, the fused module is adapted, once.

        Raises:
            ShapeError: If the adapter cannot be laid out.
        """
        degree = self.tp_degree
        geometry = self.info.geometry(dtype=self.dtype, page_bytes=self.pool.page_bytes, tp_degree=degree)
        projections = self._targeted(targets)
        ranks = tuple((layer, each.name, rank) for layer in range(self.info.num_layers) for each in projections)
        try:
            num_pages = layout(geometry, pair_sizes(ranks)).num_pages
        except ImageError as error:
            raise ShapeError(f"an adapter of rank {rank}: {error}") from error
        shapes = [projection.local_shape(degree) for projection in projections]
        widths = sum(inputs + outputs for inputs, outputs in shapes)
        traffic = sum(inputs + 2 * outputs for inputs, outputs in shapes)
        layers, item = self.info.num_layers, self.item_bytes
        num_ops = len({projection.op for projection in projections})
        weights, activations = layers * rank * widths * item, layers * traffic * item
        return AdapterSize(rank, num_pages, weights, activations, num_ops, len(projections))

    def _targeted(self, targets: tuple[str, ...]) -> LayerProjections:
        """Return the projections of a layer that targets mean; all layers are alike."""
        ops = {_OPS[target] for target in targets}
        return tuple(
            each for each in self.info.layers[0] if each.name in targets or (each.name not in _OPS and each.op in ops)
        )
