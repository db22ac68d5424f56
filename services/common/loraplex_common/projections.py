"""What an adapter may adapt, as the model's architecture declares it: the dense products of each decoder layer, embedding, lm_head."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

EMBED_OP: Final = "embed"
"""Op of the embedding, outside of the decoder layers: its input features are tokens."""
HEAD_OP: Final = "head"
"""Op of lm_head, outside of the decoder layers: its output features are tokens."""


class Split(enum.Enum):
    """How tensor-parallel ranks divide a projection."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"


class Section(NamedTuple):
    """Outputs of a projection that tensor-parallel ranks divide among themselves apart from its other outputs.

    Attributes:
        width: How many outputs.
        units: How many parts that no rank divides, such as heads of keys, they are; ranks that are more than these share them,
            several to a part. 0: the outputs are divided anywhere.
    """

    width: int
    units: int = 0

    def local_width(self, tp_degree: int) -> int:
        """Return the outputs that one of ``tp_degree`` ranks computes."""
        return self.width // self._shares(tp_degree)

    def first(self, tp_rank: int, tp_degree: int) -> int:
        """Return a rank's first output in the section."""
        return tp_rank * self._shares(tp_degree) // tp_degree * self.local_width(tp_degree)

    def is_first_holder(self, tp_rank: int, tp_degree: int) -> bool:
        """Tell whether a rank is the first of those that compute its outputs of the section."""
        return tp_rank == 0 or self.first(tp_rank - 1, tp_degree) != self.first(tp_rank, tp_degree)

    def can_be_split(self, tp_degree: int) -> bool:
        """Tell whether each rank gets as many outputs as the others."""
        if tp_degree <= 0 or (self.units % tp_degree and tp_degree % self.units):
            return False
        return not self.width % self._shares(tp_degree)

    def _shares(self, tp_degree: int) -> int:
        return min(tp_degree, self.units) if self.units else tp_degree


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection of one layer.

    Attributes:
        path: Name of the module inside its layer, for example ``self_attn.q_proj``.
        op: The fused product that computes it. The outputs of an op's projections lie one after another, in the order in
            which the layer lists them.
        in_features: Width of its input, before any split over ranks.
        out_features: Width of its output, before any split over ranks.
        split: How tensor-parallel ranks divide it.
        sections: Sections of the outputs, if they are divided one by one or in whole units; empty: all outputs are one.
    """

    path: str
    op: str
    in_features: int
    out_features: int
    split: Split = Split.OUTPUTS
    sections: tuple[Section, ...] = ()

    @property
    def name(self) -> str:
        """Last part of the path, for example ``q_proj``: unique within a layer."""
        return self.path.rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, int]:
        """``(in_features, out_features)``, before any split over ranks."""
        return self.in_features, self.out_features

    def local_shape(self, tp_degree: int) -> tuple[int, int]:
        """Return the ``(in_features, out_features)`` that one of ``tp_degree`` tensor-parallel ranks computes."""
        if self.split is Split.INPUTS:
            return self.in_features // tp_degree, self.out_features
        return self.in_features, sum(section.local_width(tp_degree) for section in self.all_sections)

    @property
    def all_sections(self) -> tuple[Section, ...]:
        """The sections of its outputs, one at least."""
        return self.sections or (Section(self.out_features),)

    def local_outputs(self, tp_rank: int, tp_degree: int) -> tuple[slice, ...]:
        """Return which outputs one rank of a split along the outputs computes, in its order."""
        begins = itertools.accumulate((section.width for section in self.all_sections), initial=0)
        firsts = [
            begin + each.first(tp_rank, tp_degree) for begin, each in zip(begins, self.all_sections, strict=False)
        ]
        widths = [section.local_width(tp_degree) for section in self.all_sections]
        return tuple(slice(first, first + width) for first, width in zip(firsts, widths, strict=True))


LayerProjections: TypeAlias = tuple[Projection, ...]
"""Projections of one layer, in the order of their ops and of each op's outputs. A layer may lack some that others have."""


@dataclass(frozen=True, slots=True)
class Op:
    """One fused product: its projections share an input, and their outputs lie one after another.

    Attributes:
        name: What the layer calls it. Two layers may have different ops of one name.
        projections: Its *slices*, in the order of their outputs.
        slices: Names of them.
    """

    name: str
    projections: LayerProjections
    slices: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(projection.name for projection in self.projections))

    def local_columns(self, tp_degree: int) -> int:
        """Return the input features that one tensor-parallel rank computes with."""
        return self.projections[0].local_shape(tp_degree)[0]

    def local_outputs(self, tp_degree: int) -> tuple[int, ...]:
        """Return the output features of each slice that one tensor-parallel rank computes."""
        return tuple(projection.local_shape(tp_degree)[1] for projection in self.projections)


def ops_of(layer: LayerProjections) -> tuple[Op, ...]:
    """Return the ops of a layer, in the order in which it first names them."""
    found: dict[str, list[Projection]] = {}
    for projection in layer:
        found.setdefault(projection.op, []).append(projection)
    return tuple(Op(name, tuple(projections)) for name, projections in found.items())


def gated_decoder_layer(
    *, hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> LayerProjections:
    """Return the projections of a layer of the Llama family: attention, then an MLP with a gate."""
    query, key_value = num_heads * head_dim, num_kv_heads * head_dim
    kv_heads = (Section(key_value, num_kv_heads),)
    return (
        Projection("self_attn.q_proj", "qkv", hidden_size, query),
        Projection("self_attn.k_proj", "qkv", hidden_size, key_value, sections=kv_heads),
        Projection("self_attn.v_proj", "qkv", hidden_size, key_value, sections=kv_heads),
        Projection("self_attn.o_proj", "o", query, hidden_size, Split.INPUTS),
        Projection("mlp.gate_proj", "gate_up", hidden_size, intermediate_size),
        Projection("mlp.up_proj", "gate_up", hidden_size, intermediate_size),
        Projection("mlp.down_proj", "down", intermediate_size, hidden_size, Split.INPUTS),
    )


def with_fused(layer: LayerProjections, op: str, path: str) -> LayerProjections:
    """Return a layer whose projections of one op are one module, with their outputs one after another.

    Args:
        layer: With a projection for each.
        op: The op.
        path: Name of the module inside its layer.
    """
    parts = [each for each in layer if each.op == op]
    sections = tuple(section for each in parts for section in each.all_sections)
    fused = Projection(path, op, parts[0].in_features, sum(each.out_features for each in parts), sections=sections)
    first = layer.index(parts[0])
    return (*layer[:first], fused, *layer[first + len(parts) :])


def embedding_and_head(vocab_size: int, hidden_size: int, *, embedding: str, lm_head: str) -> LayerProjections:
    """Return what lies outside of the decoder layers and can be adapted.

    Args:
        vocab_size: Rows of the embedding and of lm_head.
        hidden_size: Width of the residual stream.
        embedding: Path of the embedding, from the model on.
        lm_head: Path of the linear layer that computes logits.
    """
    return (
        Projection(embedding, EMBED_OP, vocab_size, hidden_size),
        Projection(lm_head, HEAD_OP, hidden_size, vocab_size),
    )
