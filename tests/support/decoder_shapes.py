"""Geometries of decoders of the Llama family, and the names of their projections, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import LOW_RANK, Geometry
from loraplex_common.projections import embedding_and_head, gated_decoder_layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.adapter_image import Tensors
    from loraplex_common.part_kind import Arrays
    from loraplex_common.projections import LayerProjections

OPS: Final = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTIONS: Final = tuple(projection for slices in OPS.values() for projection in slices)
ROW_PARALLEL: Final = frozenset({"o_proj", "down_proj"})  # split along their inputs under tensor parallelism


def decoder_geometry(
    *,
    dtype: str,
    page_bytes: int,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tp_degree: int = 1,
    vocab_size: int = 0,
) -> Geometry:
    """Return the image geometry of a decoder whose layers are all alike; with a vocabulary, embedding and lm_head too."""
    layer = gated_decoder_layer(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    outside: LayerProjections = ()
    if vocab_size:
        outside = embedding_and_head(
            vocab_size=vocab_size, hidden_size=hidden_size, embedding="model.embed_tokens", lm_head="lm_head"
        )
    return Geometry.of((layer,) * num_layers, outside, dtype=dtype, page_bytes=page_bytes, tp_degree=tp_degree)


def pair_tensors(pairs: Mapping[tuple[int, str], Arrays]) -> Tensors:
    """Return an adapter's tensors from the A and B of each (layer, projection)."""
    return {(*key, LOW_RANK): pair for key, pair in pairs.items()}
