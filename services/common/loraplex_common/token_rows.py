"""Rows of the embedding or of lm_head that an adapter replaces: what training saved of them as values, not as deltas.

``embed_tokens``: a token with ``ids[i]`` has the embedding ``values[i]``. ``lm_head``: the logit of ``ids[i]`` is ``values[i] . h``.
A row is final: where the module has a pair too, the pair is already in the row's values, and adds nothing to it. Ids from the
base's vocabulary on are tokens that the adapter adds.

Per op, an image holds the ids (int32, cut into ``[1][n]`` tiles), then the values: tiles ``[n][hidden]`` of whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from loraplex_common.image_geometry import ImageError
from loraplex_common.part_kind import Arrays, Entry, Matrices, Tile, cut
from loraplex_common.projections import EMBED_OP, HEAD_OP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection

ROWS: Final = "rows"
DEFAULT_MAX_ADDED_TOKENS: Final = 256
"""Tokens that an adapter may add behind the base's vocabulary, unless an engine is told otherwise (``--max-added-tokens``)."""
MOST_ADDED_TOKENS: Final = 1 << 16
"""Largest setting of ``--max-added-tokens``: each widens every penalty count by a token, and logits of steps that have them."""
KIND_IDS: Final = 10
KIND_ROW_VALUES: Final = 11

ROWS_DTYPE: Final = np.dtype(
    [
        ("count", np.int32),  # rows; 0: none
        ("id_first", np.int32),
        ("id_step", np.int32),
        ("value_first", np.int32),
        ("value_step", np.int32),
        ("last_id", np.int32),
        ("id_offset", np.int64),
        ("value_offset", np.int64),
        ("padding", np.int64),
    ]
)
"""Table entry, 48 bytes: first tile, ids or rows of every tile but the last, offset in the pool or -1."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the embedding or of lm_head that stand in the place of the base's.

    Attributes:
        num_rows: How many; rows equal to the base's are not among them.
        last_id: Largest token id among them.
    """

    kind: ClassVar[str] = ROWS
    num_rows: int
    last_id: int

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.num_rows


class RowsKind:
    """See `PartKind`; the tensors of a part are ids ``[n]`` int32, ascending, and values ``[n, hidden]`` fp32."""

    name: str = ROWS
    part: type[Rows] = Rows
    entries: Mapping[int, Entry] = MappingProxyType(
        {KIND_IDS: Entry("row ids", True, "int32"), KIND_ROW_VALUES: Entry("row values", True, is_cut_by_rows=True)}
    )
    table_dtype: np.dtype[np.void] = ROWS_DTYPE
    tile_fields: tuple[str, ...] = ("id_first", "value_first")

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """See `PartKind`."""
        return {"ids": (size,), "values": (size, row_width(projection))}

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`; a geometry of several ranks offers no modules outside of the layers."""
        del projection, tp_rank, tp_degree
        return arrays

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """See `PartKind`: the ids, then the values.

        Raises:
            ImageError: If the op is neither the embedding nor lm_head, or a row exceeds a tile.
        """
        del layer
        (projection,) = op.projections if len(op.projections) == 1 else (None,)
        if projection is None or op.name not in (EMBED_OP, HEAD_OP):
            raise ImageError(f"{op.name}: only the embedding and lm_head have rows that an adapter replaces")
        (size,) = sizes
        item, id_item = (self.entries[each].item_bytes(geometry.dtype) for each in (KIND_ROW_VALUES, KIND_IDS))
        for start, stop in cut(geometry, size, 1, f"{projection.name}: row ids", id_item):
            yield Tile(KIND_IDS, 0, start, 1, stop - start)
        width = row_width(projection)
        step = geometry.tile_bytes // (width * item)
        if not step:
            raise ImageError(
                f"{projection.name}: a row of {width} x {item} = {width * item} bytes exceeds a tile of {geometry.tile_bytes}"
            )
        for start in range(0, size, step):
            yield Tile(KIND_ROW_VALUES, 0, start, min(step, size - start), width)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[Any]) -> None:
        """See `PartKind`."""
        part = parts[tile.slice]
        assert part is not None
        ids, values = part
        if tile.entry == KIND_IDS:
            out[0] = ids[tile.start : tile.start + tile.cols]
        else:
            out[:] = values[tile.start : tile.start + tile.rows]

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """See `PartKind`."""
        for entry, name, length in ((KIND_IDS, "id", "cols"), (KIND_ROW_VALUES, "value", "rows")):
            mine = matrices.tiles["kind"] == entry
            tiles = matrices.tiles[mine]
            at = (tiles["layer"], tiles["op"])
            entries[f"{name}_first"][at], entries[f"{name}_step"][at] = matrices.numbers[mine], tiles[length]
            entries[f"{name}_offset"][at] = matrices.offsets[mine]

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[Rows]
    ) -> None:
        """See `PartKind`."""
        entries["count"][places[:2]] = [part.num_rows for part in parts]
        entries["last_id"][places[:2]] = [part.last_id for part in parts]


def row_width(projection: Projection) -> int:
    """Return how long a row is: the embedding's outputs, lm_head's inputs."""
    return projection.out_features if projection.op == EMBED_OP else projection.in_features


def num_vocabulary_rows(projection: Projection) -> int:
    """Return how many rows the base has: the embedding's inputs, lm_head's outputs."""
    return projection.in_features if projection.op == EMBED_OP else projection.out_features
