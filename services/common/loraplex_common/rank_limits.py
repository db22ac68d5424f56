"""How large an adapter may be: ranks that tiles hold and kernels take, rows that the pool holds, added tokens. The one place that says so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import layout
from loraplex_common.image_geometry import ITEM_BYTES, Geometry, ImageError
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.part_kind import least_columns
from loraplex_common.token_rows import DEFAULT_MAX_ADDED_TOKENS, ROWS, num_vocabulary_rows, row_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.adapter_parts import PartSizes
    from loraplex_common.base_model import BaseModelInfo

CUDA_MAX_RANK: Final = 512
"""Largest rank of one projection that the CUDA kernels take (kMaxRank); stacked, q, k and v have three times that."""
KERNEL_COLUMNS: Final = 8
"""Fewest columns of an A tile that the CUDA kernels read: a lane's, in either dtype."""
_ANY_PAGE_BYTES: Final = 2 * 1024 * 1024  # holds the largest tile


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLimits:
    """What decides whether an engine can take an adapter's ranks.

    Attributes:
        name: Name of the engine or tool, for messages.
        max_rank: Largest rank of one projection that its kernels take; 0 if only the tiles limit it.
        max_image_pages: Pages of the largest image that its pool can hold; 0 if that is not known.
        max_added_tokens: Tokens that an adapter may add behind the base's vocabulary.
    """

    name: str
    base_fingerprint: str
    geometry: Geometry
    max_rank: int = 0
    max_image_pages: int = 0
    max_added_tokens: int = DEFAULT_MAX_ADDED_TOKENS

    def check(self, sizes: PartSizes, last_row_id: int = -1) -> None:
        """Return if the engine can take an adapter whose parts have these sizes.

        Args:
            sizes: The parts.
            last_row_id: Largest token id of which it has a row of its own; -1 without any.

        Raises:
            ImageError: If it cannot; the message has the arithmetic.
        """
        for layer, projection, kind, rank in sizes:
            self.geometry.projection(layer, projection)  # refuses what the engine does not offer
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
        self._check_added(last_row_id)
        if self.max_rank:
            self._check_columns(pairs)
        if len(pairs) < len(sizes):
            layout(self.geometry, sizes)
        if self.max_image_pages and any(each.kind == ROWS for each in sizes):
            self._check_pages(sizes)

    def _check_columns(self, pairs: PartSizes) -> None:
        most = self.geometry.tile_bytes // (KERNEL_COLUMNS * ITEM_BYTES[self.geometry.dtype])
        stacked: Counter[tuple[int, str]] = Counter()
        for layer, projection, _, rank in pairs:
            stacked[layer, self.geometry.projection(layer, projection).op] += rank
        for (layer, op), rank in stacked.items():
            if rank > most:
                raise ImageError(
                    f"layer {layer} {op}: stacked rank {rank} exceeds the {most} that the kernels of {self.name} take in "
                    f"{self.geometry.dtype}; train or convert the adapter to a lower rank, or start the engine with --backend torch"
                )

    def _check_added(self, last_row_id: int) -> None:
        if last_row_id < 0 or self.geometry.outside is None:
            return
        vocabulary = max(num_vocabulary_rows(each) for each in self.geometry.layers[self.geometry.outside])
        if last_row_id >= vocabulary + self.max_added_tokens:
            raise ImageError(
                f"token {last_row_id} is beyond the {vocabulary} tokens of the base model and the {self.max_added_tokens} that "
                f"{self.name} takes beside them; start the engine with --max-added-tokens {last_row_id + 1 - vocabulary}"
            )

    def _check_pages(self, sizes: PartSizes) -> None:
        num_pages = layout(self.geometry, sizes).num_pages
        if num_pages <= self.max_image_pages:
            return
        page = self.geometry.page_bytes
        rows = [
            f"{size} rows of {projection} x {row_width(found) * ITEM_BYTES[self.geometry.dtype]} bytes"
            for layer, projection, kind, size in sizes
            if kind == ROWS and (found := self.geometry.projection(layer, projection))
        ]
        raise ImageError(
            f"its image of {num_pages} pages x {page} = {num_pages * page} bytes, of which {' and '.join(rows)}, exceeds the {self.max_image_pages} "
            f"pages, {self.max_image_pages * page} bytes, that the pool of {self.name} can give to one adapter; give the engine a "
            "larger pool (--pool-bytes), or train fewer rows (trainable_token_indices)"
        )


def max_stacked_rank(geometry: Geometry) -> int:
    """Return the largest rank whose tiles fit: of a projection, of q, k and v together, of gate and up together."""
    item_bytes = ITEM_BYTES[geometry.dtype]
    return geometry.tile_bytes // (least_columns(item_bytes) * item_bytes)


def check_servable(sizes: PartSizes, base: BaseModelInfo, engines: Sequence[RankLimits], last_row_id: int = -1) -> None:
    """Return if every engine of the base model can take an adapter; where none is known, if there could be one.

    Args:
        sizes: Sizes of the adapter's parts.
        base: Its base model.
        engines: All engines known, of whichever base model.
        last_row_id: As of `RankLimits.check`.

    Raises:
        ImageError: If one cannot; the message has the arithmetic.
    """
    known = [engine for engine in engines if engine.base_fingerprint == base.fingerprint]
    for engine in known or (_most_capable(base),):
        engine.check(sizes, last_row_id)


def _most_capable(base: BaseModelInfo) -> RankLimits:
    """Return the limits of an engine that takes the largest ranks: half the bytes a value, no kernels of our own."""
    geometry = base.geometry(dtype="bfloat16", page_bytes=_ANY_PAGE_BYTES)
    return RankLimits(name="any engine", base_fingerprint=base.fingerprint, geometry=geometry)
