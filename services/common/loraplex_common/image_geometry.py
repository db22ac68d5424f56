"""What an adapter's page image depends on besides the adapter: the engine's geometry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from loraplex_common.projections import EMBED_OP, HEAD_OP, LayerProjections, Op, Projection, Split, ops_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LAYOUT_VERSION: Final = 2
"""1 knew the seven projections of the Llama family only."""
TILE_BYTES: Final = 32 * 1024
TILE_ALIGN: Final = 128
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2}

OUTSIDE_NAMES: Final = frozenset({"embed_tokens", "lm_head"})
"""How modules outside of the decoder layers are called; for messages."""


class ImageError(ValueError):
    """An adapter cannot be laid out in this geometry; the message says what does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """All that an image depends on besides the adapter.

    Layers that offer the same projections share one description, so that a geometry is compared, hashed and sent in a few
    numbers. `Geometry.of` makes one from the layers as the model declares them.

    Attributes:
        dtype: ``float32`` (CPU) or ``bfloat16`` (GPU): the engine's compute dtype.
        page_bytes: Bytes of a page of the pool.
        distinct_layers: The different descriptions of layers, in the order of the first layer that each describes.
        layer_indices: Per layer, its description in ``distinct_layers``.
        has_outside: Whether the last layer is none of the decoder's, but the modules outside of them: embedding and lm_head.
        tp_degree: Tensor-parallel degree; there is one image per rank.
        ops: All different ops of the model, those outside of the decoder layers last. Two ops of one name differ in their
            projections, in different layers.
        num_decoder_ops: How many of ``ops`` the decoder layers have.
    """

    layout_version: int = LAYOUT_VERSION
    dtype: str
    page_bytes: int
    distinct_layers: tuple[LayerProjections, ...]
    layer_indices: tuple[int, ...]
    has_outside: bool = False
    tp_degree: int = 1
    num_decoder_ops: int = field(init=False, compare=False, repr=False)
    ops: tuple[Op, ...] = field(init=False, compare=False, repr=False)
    _op_indices: tuple[dict[str, int], ...] = field(init=False, compare=False, repr=False)
    _projections: tuple[dict[str, Projection], ...] = field(init=False, compare=False, repr=False)
    _places: tuple[dict[str, tuple[int, int]], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.layout_version != LAYOUT_VERSION:
            raise ImageError(f"layout version {self.layout_version} is not {LAYOUT_VERSION}: upgrade the older side")
        if self.dtype not in ITEM_BYTES:
            raise ImageError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if self.page_bytes <= 0 or self.page_bytes % TILE_ALIGN:
            raise ImageError(f"page_bytes {self.page_bytes} is not a positive multiple of {TILE_ALIGN}")
        for index in self.layer_indices:
            if not 0 <= index < len(self.distinct_layers):
                raise ImageError(f"layer description {index} does not exist: there are {len(self.distinct_layers)}")
        self._check_outside()
        for layer in self.distinct_layers:
            _check_layer(layer, self.tp_degree)
        per_layer = [ops_of(layer) for layer in self.distinct_layers]
        ops = tuple(dict.fromkeys(op for layer in per_layer for op in layer))
        place = {op: index for index, op in enumerate(ops)}
        numbered = [[(op, place[op]) for op in layer] for layer in per_layer]
        inside = {op for index in self.layer_indices[: self.num_decoder_layers] for op in per_layer[index]}
        derived = {
            "num_decoder_ops": len(inside) if self.has_outside else len(ops),
            "ops": ops,
            "_op_indices": tuple({op.name: number for op, number in layer} for layer in numbered),
            "_projections": tuple({each.name: each for each in layer} for layer in self.distinct_layers),
            "_places": tuple(
                {name: (number, index) for op, number in layer for index, name in enumerate(op.slices)}
                for layer in numbered
            ),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerProjections],
        outside: LayerProjections = (),
        *,
        dtype: str,
        page_bytes: int,
        tp_degree: int = 1,
    ) -> Geometry:
        """Return the geometry of a model whose layers offer these projections, and which offers ``outside`` beside them.

        Raises:
            ImageError: If it is none: a dtype, size or layer makes no sense.
        """
        layers = (*layers, outside) if outside else tuple(layers)
        if tp_degree == 1:  # sections say nothing then, and one geometry has one description
            layers = tuple(tuple(replace(each, sections=()) for each in layer) for layer in layers)
        distinct = {layer: index for index, layer in enumerate(dict.fromkeys(layers))}
        return cls(
            dtype=dtype,
            page_bytes=page_bytes,
            distinct_layers=tuple(distinct),
            layer_indices=tuple(distinct[layer] for layer in layers),
            has_outside=bool(outside),
            tp_degree=tp_degree,
        )

    @property
    def num_layers(self) -> int:
        """Layers that specs, images and tables count: the decoder's, and one for what lies outside of them."""
        return len(self.layer_indices)

    @property
    def num_decoder_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layer_indices) - self.has_outside

    @property
    def outside(self) -> int | None:
        """The layer that stands for what lies outside of the decoder's, behind them; None if nothing is offered there."""
        return self.num_decoder_layers if self.has_outside else None

    @property
    def layers(self) -> tuple[LayerProjections, ...]:
        """What each layer offers to adapters, ``outside`` included."""
        return tuple(self.distinct_layers[index] for index in self.layer_indices)

    @property
    def decoder_layers(self) -> tuple[LayerProjections, ...]:
        """What each layer of the decoder offers to adapters."""
        return self.layers[: self.num_decoder_layers]

    @property
    def decoder_ops(self) -> tuple[Op, ...]:
        """The first of ``ops``: all that the decoder's layers have."""
        return self.ops[: self.num_decoder_ops]

    @property
    def projection_names(self) -> tuple[str, ...]:
        """Names of all projections that any layer offers, without repetition."""
        return tuple(dict.fromkeys(each.name for layer in self.distinct_layers for each in layer))

    @property
    def tile_bytes(self) -> int:
        """Largest tile, in bytes."""
        return min(TILE_BYTES, self.page_bytes)

    def projection(self, layer: int, name: str) -> Projection:
        """Return one projection.

        Raises:
            ImageError: If the layer does not exist or has no such projection.
        """
        if not 0 <= layer < len(self.layer_indices):
            raise ImageError(self._missing(layer, name))
        offered = self._projections[self.layer_indices[layer]]
        if name not in offered:
            raise ImageError(f"projection {name!r} is not one of {', '.join(offered)}, which layer {layer} offers")
        return offered[name]

    def local_shape(self, layer: int, name: str) -> tuple[int, int]:
        """Return the ``(in_features, out_features)`` that one tensor-parallel rank computes.

        Raises:
            ImageError: As `projection`.
        """
        return self.projection(layer, name).local_shape(self.tp_degree)

    def place(self, layer: int, name: str) -> tuple[int, int]:
        """Return where a projection that the layer offers is computed: an index into ``ops``, and the slice of that op."""
        return self._places[self.layer_indices[layer]][name]

    def op_indices(self, layer: int) -> Mapping[str, int]:
        """Return, by name and in the layer's order, where its ops stand in ``ops``."""
        return self._op_indices[self.layer_indices[layer]]

    def _missing(self, layer: int, name: str) -> str:
        if layer == self.num_decoder_layers and name in OUTSIDE_NAMES:
            return (
                f"{name} is outside of the decoder layers, where this engine offers nothing to adapters: serve the adapter on an "
                "engine of this version with one tensor-parallel rank"
            )
        return f"layer {layer} does not exist: the base model has {self.num_decoder_layers}"

    def _check_outside(self) -> None:
        """Refuse modules outside of the layers that could not be told apart from a layer's, or would have to be divided.

        Raises:
            ImageError: If so.
        """
        if not self.has_outside:
            return
        if self.tp_degree > 1:
            raise ImageError(f"modules outside of the decoder layers are not divided over tp_degree {self.tp_degree}")
        last = len(self.distinct_layers) - 1
        if self.layer_indices.count(last) != 1 or self.layer_indices[-1] != last or not self.distinct_layers[last]:
            raise ImageError("what lies outside of the decoder layers needs a description of its own, behind theirs")
        for projection in self.layers[-1]:
            if projection.op not in (EMBED_OP, HEAD_OP):
                raise ImageError(
                    f"{projection.path} is outside of the decoder layers, but neither embedding nor lm_head"
                )


def _check_layer(layer: LayerProjections, tp_degree: int) -> None:
    """Refuse a layer whose projections cannot be told apart, fused or divided.

    Raises:
        ImageError: If so; the message names the projection.
    """
    names: set[str] = set()
    for projection in layer:
        if projection.name in names:
            raise ImageError(f"a layer has two projections named {projection.name!r}")
        names.add(projection.name)
        if min(projection.shape) <= 0:
            raise ImageError(f"{projection.path}: {projection.in_features} x {projection.out_features} is no matrix")
        width = projection.in_features if projection.split is Split.INPUTS else projection.out_features
        if projection.sections and sum(section.width for section in projection.sections) != projection.out_features:
            raise ImageError(f"{projection.path}: sections of other than its {projection.out_features} outputs")
        if projection.split is Split.INPUTS:
            is_even = tp_degree > 0 and not width % tp_degree
        else:
            is_even = all(section.can_be_split(tp_degree) for section in projection.all_sections)
        if not is_even:
            raise ImageError(
                f"{width} {projection.split.value} of {projection.path} cannot be split over tp_degree {tp_degree}"
            )
    for op in ops_of(layer):
        if len({(projection.in_features, projection.split) for projection in op.projections}) > 1:
            raise ImageError(f"the projections of {op.name}, {', '.join(op.slices)}, do not share one input")
