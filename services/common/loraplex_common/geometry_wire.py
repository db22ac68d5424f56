"""The geometry of images on the wire: engines say it, the adapter store reads it."""

from __future__ import annotations

from typing import Final

from loraplex.v1 import adapter_pb2

from loraplex_common.image_geometry import LAYOUT_VERSION, Geometry, ImageError
from loraplex_common.projections import Projection, Section, Split

_SPLITS: Final[dict[adapter_pb2.Projection.Split.ValueType, Split]] = {
    adapter_pb2.Projection.SPLIT_OUTPUTS: Split.OUTPUTS,
    adapter_pb2.Projection.SPLIT_INPUTS: Split.INPUTS,
}
_WIRE_SPLITS: Final = {split: value for value, split in _SPLITS.items()}

MAX_LAYERS: Final = 4096
"""Most decoder layers, and most descriptions of them, that are read; far more than any model has."""
MAX_PROJECTIONS: Final = 4096
"""Most projections of all descriptions together."""
MAX_SECTIONS: Final = 16
"""Most sections of one projection."""


def to_message(geometry: Geometry) -> adapter_pb2.Geometry:
    """Encode a geometry."""
    return adapter_pb2.Geometry(
        layout_version=geometry.layout_version,
        dtype=geometry.dtype,
        page_bytes=geometry.page_bytes,
        tp_degree=geometry.tp_degree,
        distinct_layers=[
            adapter_pb2.DecoderLayer(projections=[_projection_message(each) for each in layer])
            for layer in geometry.distinct_layers[: len(geometry.distinct_layers) - geometry.has_outside]
        ],
        layer_indices=geometry.layer_indices[: geometry.num_decoder_layers],
        outside=[_projection_message(each) for each in geometry.layers[-1]] if geometry.has_outside else (),
    )


def from_message(message: adapter_pb2.Geometry) -> Geometry:
    """Decode a geometry.

    Raises:
        ImageError: If it is of another layout version or too large, or makes no sense; the message says what, and the
            remedy.
    """
    is_known = message.layout_version == LAYOUT_VERSION  # what another version says of layers is not read
    if is_known:
        _check_sizes(message)
    layers = tuple(
        tuple(_projection(each) for each in layer.projections)
        for layer in (message.distinct_layers if is_known else ())
    )
    indices = tuple(message.layer_indices if is_known else ())
    if outside := tuple(_projection(each) for each in (message.outside if is_known else ())):
        layers, indices = (*layers, outside), (*indices, len(layers))
    return Geometry(
        layout_version=message.layout_version,
        dtype=message.dtype,
        page_bytes=message.page_bytes,
        tp_degree=message.tp_degree or 1,
        distinct_layers=layers,
        layer_indices=indices,
        has_outside=bool(outside),
    )


def _check_sizes(message: adapter_pb2.Geometry) -> None:
    """Refuse a geometry of which reading, comparing and keeping would cost the reader much.

    Raises:
        ImageError: If it has too many layers or projections.
    """
    for what, number in (
        ("decoder layers", len(message.layer_indices)),
        ("layer descriptions", len(message.distinct_layers)),
    ):
        if number > MAX_LAYERS:
            raise ImageError(f"{number} {what} exceed the {MAX_LAYERS} that are read")
    if (
        number := sum(len(each.projections) for each in message.distinct_layers) + len(message.outside)
    ) > MAX_PROJECTIONS:
        raise ImageError(f"{number} projections exceed the {MAX_PROJECTIONS} that are read")


def _projection_message(projection: Projection) -> adapter_pb2.Projection:
    return adapter_pb2.Projection(
        path=projection.path,
        op=projection.op,
        in_features=projection.in_features,
        out_features=projection.out_features,
        # A reader that knows no sections refuses the projection instead of dividing it wrongly.
        split=adapter_pb2.Projection.SPLIT_SECTIONS if projection.sections else _WIRE_SPLITS[projection.split],
        sections=[
            adapter_pb2.Projection.Section(width=section.width, units=section.units) for section in projection.sections
        ],
    )


def _projection(message: adapter_pb2.Projection) -> Projection:
    if len(message.sections) > MAX_SECTIONS:
        raise ImageError(
            f"projection {message.path!r}: {len(message.sections)} sections exceed the {MAX_SECTIONS} read"
        )
    sections = tuple(Section(each.width, each.units) for each in message.sections)
    if message.split == adapter_pb2.Projection.SPLIT_SECTIONS and sections:
        return Projection(message.path, message.op, message.in_features, message.out_features, sections=sections)
    if message.split not in _SPLITS:
        raise ImageError(
            f"projection {message.path!r}: split {message.split} is none that this version knows: upgrade the older side"
        )
    return Projection(message.path, message.op, message.in_features, message.out_features, _SPLITS[message.split])
