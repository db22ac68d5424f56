"""The kinds of parts that adapters may have, and what an adapter's spec says of its parts.

A new kind is one class (`loraplex_common.part_kind.PartKind`) and one line in `KINDS`; what it takes of the kernels, the
checkpoint reader and the runners is listed in ADR 26.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from loraplex_common.flora import FLORA, FloraKind
from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import LOW_RANK, LowRank, LowRankKind
from loraplex_common.part_kind import Part
from loraplex_common.sparse_delta import SparseDeltaKind
from loraplex_common.token_rows import ROWS, Rows, RowsKind
from loraplex_common.vectors import IN_VECTOR, OUT_VECTOR, BiasKind, InVectorKind, OutVector, OutVectorKind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.part_kind import PartKind

KINDS: Final[dict[str, PartKind]] = {
    kind.name: kind
    for kind in (LowRankKind(), OutVectorKind(), InVectorKind(), BiasKind(), SparseDeltaKind(), FloraKind(), RowsKind())
}
"""All kinds of parts by name, in the order in which an op's parts follow each other in an image."""

MULTIPLYING_KINDS: Final = frozenset({OUT_VECTOR, IN_VECTOR, FLORA})
"""Kinds whose part multiplies what the base computes instead of adding to it."""
UNSCALABLE_KINDS: Final = MULTIPLYING_KINDS | {ROWS}
"""Kinds whose part has no scale: it multiplies or replaces what the base computes."""


class PartSize(NamedTuple):
    """What the layout depends on of one part.

    Attributes:
        size: `Part.size`.
    """

    layer: int
    projection: str
    kind: str
    size: int


PartSizes: TypeAlias = tuple[PartSize, ...]
"""Sizes of every part of an adapter, a key to cache its layout by."""


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted projection of one layer.

    Attributes:
        parts: At most one of each kind.
    """

    layer: int
    projection: str
    parts: tuple[Part, ...]

    @classmethod
    def low_rank(cls, layer: int, projection: str, rank: int, scaling: float) -> ModuleSpec:
        """Return a module of plain LoRA; arguments as of `LowRank`."""
        return cls(layer, projection, (LowRank(rank, scaling),))

    @property
    def pair(self) -> LowRank | None:
        """Its low-rank pair, if it has one."""
        for part in self.parts:  # read for every module of each load
            if isinstance(part, LowRank):
                return part
        return None

    @property
    def rank(self) -> int:
        """Rank of its low-rank pair; 0 without one."""
        return self.pair.rank if self.pair is not None else 0

    @property
    def scaling(self) -> float:
        """Scaling of its low-rank pair; 0 without one."""
        return self.pair.scaling if self.pair is not None else 0.0


_ACTIVATION: Final = "activation"
"""Stands in the first module of an activated adapter among its parts, though it is none that an engine computes."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an engine must know of an adapter besides its pages.

    Attributes:
        digest: The revision: sha256 over canonical config and tensors, 64 hex digits.
        modules: Adapted projections, by layer.
        is_activated: It applies from a token of the prompt on that each request names (activated LoRA).
        sizes: What the layout depends on.
    """

    digest: str
    modules: tuple[ModuleSpec, ...]
    is_activated: bool = False
    sizes: PartSizes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [
            PartSize(each.layer, each.projection, part.kind, part.size) for each in self.modules for part in each.parts
        ]
        object.__setattr__(self, "sizes", tuple(sizes))

    @property
    def max_rank(self) -> int:
        """Largest rank of any module."""
        return max((size for _, _, kind, size in self.sizes if kind == LOW_RANK), default=0)

    @property
    def has_magnitudes(self) -> bool:
        """Whether the engine computes factors of it from its own weights (DoRA)."""
        if not any(kind == OUT_VECTOR for _, _, kind, _ in self.sizes):
            return False
        parts = (part for module in self.modules for part in module.parts)
        return any(isinstance(part, OutVector) and part.is_magnitude for part in parts)

    @property
    def unscalable(self) -> PartSize | None:
        """The first part that a request's own scale cannot be applied to: c, e, FLoRA and rows of tokens."""
        return next((each for each in self.sizes if each.kind in UNSCALABLE_KINDS), None)

    @property
    def last_row_id(self) -> int:
        """Largest token id with a row of its own in the embedding or lm_head; -1 without any."""
        if not any(kind == ROWS for _, _, kind, _ in self.sizes):
            return -1
        parts = (part for module in self.modules for part in module.parts)
        return max(part.last_id for part in parts if isinstance(part, Rows))

    def to_json(self) -> bytes:
        """Encode for the wire and for the adapter's manifest.

        A reader that does not know activated adapters would apply one to whole sequences; the mark makes it refuse the adapter
        as one with a part of a kind that it does not know.
        """
        modules = [_module_fields(module) for module in self.modules]
        if self.is_activated:
            modules[0]["parts"] = {**modules[0].get("parts", {}), _ACTIVATION: {}}
        return json.dumps({"digest": self.digest, "modules": modules}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> AdapterSpec:
        """Decode what `to_json` wrote.

        Raises:
            ImageError: If a module has no part, or one of a kind that this version does not know.
            KeyError: If a field is missing.
            TypeError: If there is a field too many, or a module is not an object or its parts are none.
        """
        fields: dict[str, Any] = json.loads(data)
        is_activated = _take_activation(fields["modules"])
        return cls(fields["digest"], tuple(_module_of(module) for module in fields["modules"]), is_activated)


def _take_activation(modules: Any) -> bool:
    """Take the mark of an activated adapter out of a spec's modules; return whether it was there."""
    parts = modules[0].get("parts") if isinstance(modules, list) and modules and isinstance(modules[0], dict) else None
    if not isinstance(parts, dict) or _ACTIVATION not in parts:
        return False
    del parts[_ACTIVATION]
    if not parts:
        del modules[0]["parts"]
    return True


def pair_sizes(ranks: Iterable[tuple[int, str, int]]) -> PartSizes:
    """Return the sizes of an adapter of plain LoRA from its modules' ``(layer, projection, rank)``."""
    return tuple(PartSize(layer, projection, LOW_RANK, rank) for layer, projection, rank in ranks)


def check_kinds(spec: AdapterSpec, computed: Collection[str], backend: str) -> None:
    """Refuse an adapter with a part that a backend does not compute.

    Raises:
        ImageError: If it has one; the message names module, kind and what the backend computes.
    """
    for layer, projection, kind, _ in spec.sizes:
        if kind not in computed:
            raise ImageError(
                f"layer {layer} {projection}: backend {backend} does not compute parts of kind {kind!r}, only "
                f"{', '.join(computed)}"
            )


def check_inside(spec: AdapterSpec, geometry: Geometry, backend: str) -> None:
    """Refuse an adapter with modules outside of the decoder layers, which a backend does not compute.

    Raises:
        ImageError: If it has one; the message names it.
    """
    for layer, projection, _, _ in spec.sizes:
        if layer == geometry.outside:
            raise ImageError(
                f"{projection}: backend {backend} computes no adapters of modules outside of the decoder layers"
            )


_PLAIN_FIELDS: Final = frozenset({"layer", "projection", "rank", "scaling"})


def _module_fields(module: ModuleSpec) -> dict[str, Any]:
    """Return a module's JSON. A pair's fields are the module's own, as in all specs written so far."""
    fields: dict[str, Any] = {"layer": module.layer, "projection": module.projection}
    others: dict[str, Any] = {}
    for part in module.parts:
        values: dict[str, Any] = asdict(part)  # type: ignore[call-overload]
        if part.kind == LOW_RANK:
            fields |= values
        else:
            others[part.kind] = values
    return fields | {"parts": others} if others else fields


def _module_of(module: Any) -> ModuleSpec:
    fields = _object(module, "a module")
    if fields.keys() == _PLAIN_FIELDS:
        return ModuleSpec.low_rank(**fields)
    layer, projection = fields.pop("layer"), fields.pop("projection")
    others = _object(fields.pop("parts", {}), f"layer {layer} {projection}: parts")
    parts: list[Part] = [LowRank(**fields)] if fields else []
    for name, values in others.items():
        if name not in KINDS:
            raise ImageError(
                f"layer {layer} {projection}: part kind {name!r} is not one of {', '.join(KINDS)}: upgrade the older side"
            )
        parts.append(KINDS[name].part(**values))
    if not parts:
        raise ImageError(
            f"layer {layer} {projection}: no part; a module without one would leave the base model as it is"
        )
    return ModuleSpec(layer, projection, tuple(parts))


def _object(value: Any, what: str) -> dict[str, Any]:
    """Return a copy of a JSON object.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{what}: expected an object, got {type(value).__name__}")
    return dict(value)
