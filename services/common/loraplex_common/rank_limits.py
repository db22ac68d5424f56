"""How large a rank may be: what an engine's tiles hold, and what its kernels take. The one place that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import layout
from loraplex_common.image_geometry import ITEM_BYTES, Geometry, ImageError
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.part_kind import TILE_STEPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.adapter_parts import PartSizes
    from loraplex_common.base_model import BaseModelInfo

CUDA_MAX_RANK: Final = 512
"""Largest rank of one projection that the CUDA kernels take (kMaxRank); stacked, q, k and v have three times that."""
_ANY_PAGE_BYTES: Final = 2 * 1024 * 1024  # holds the largest tile


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLimits:
    """What decides whether an engine can take an adapter's ranks.

    Attributes:
        name: Name of the engine or tool, for messages.
        max_rank: Largest rank of one projection that its kernels take; 0 if only the tiles limit it.
    """

    name: str
    base_fingerprint: str
    geometry: Geometry
    max_rank: int = 0

    def check(self, sizes: PartSizes) -> None:
        """Return if the engine can take an adapter whose parts have these sizes.

        Raises:
            ImageError: If it cannot; the message has the arithmetic.
        """
        for layer, projection, kind, rank in sizes:
            if kind == LOW_RANK and self.max_rank and rank > self.max_rank:
                raise ImageError(
                    f"layer {layer} {projection}: rank {rank} exceeds the {self.max_rank} that the kernels of {self.name} "
                    "take for one projection; train or convert the adapter to a lower rank"
                )
        pairs = tuple(each for each in sizes if each.kind == LOW_RANK)
        try:
            layout(self.geometry, pairs)
        except ImageError as error:
            bound = f"{self.name} takes at most rank {max_stacked_rank(self.geometry)} there"
            raise ImageError(f"{error}; {bound}; train or convert the adapter to a lower rank") from error
        if len(pairs) < len(sizes):
            layout(self.geometry, sizes)


def max_stacked_rank(geometry: Geometry) -> int:
    """Return the largest rank whose tiles fit: of a projection, of q, k and v together, of gate and up together."""
    return geometry.tile_bytes // (TILE_STEPS[-1] * ITEM_BYTES[geometry.dtype])


def check_servable(sizes: PartSizes, base: BaseModelInfo, engines: Sequence[RankLimits]) -> None:
    """Return if every engine of the base model can take an adapter; where none is known, if there could be one.

    Args:
        sizes: Sizes of the adapter's parts.
        base: Its base model.
        engines: All engines known, of whichever base model.

    Raises:
        ImageError: If one cannot; the message has the arithmetic.
    """
    known = [engine for engine in engines if engine.base_fingerprint == base.fingerprint]
    for engine in known or (_most_capable(base),):
        engine.check(sizes)


def _most_capable(base: BaseModelInfo) -> RankLimits:
    """Return the limits of an engine that takes the largest ranks: half the bytes a value, no kernels of our own."""
    geometry = base.geometry(dtype="bfloat16", page_bytes=_ANY_PAGE_BYTES)
    return RankLimits(name="any engine", base_fingerprint=base.fingerprint, geometry=geometry)
