"""The sparse delta S of SHiRA (arXiv:2406.13175): ``y += S x``, with few non-zeros, held by output row (CSR).

Per slice, an image holds the values (compute dtype), the column of each (uint16), and where each output's values begin
(int32, ``out_features + 1``), each cut into ``[1][n]`` tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import MAX_SLICES
from loraplex_common.part_kind import Arrays, Entry, Matrices, Tile, cut
from loraplex_common.projections import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection

SPARSE_DELTA: Final = "sparse_delta"
KIND_VALUES: Final = 5
KIND_COLUMNS: Final = 6
KIND_STARTS: Final = 7
MAX_COLUMNS: Final = 1 << 16

SPARSE_DTYPE: Final = np.dtype(
    [
        *(
            (f"{name}_{what}", np.int32, MAX_SLICES)
            for name in ("value", "column", "start")
            for what in ("first", "step")
        ),
        ("count", np.int32, MAX_SLICES),  # non-zeros; 0: the slice has no delta
        ("scaling", np.float32, MAX_SLICES),
        *((f"{name}_offset", np.int64, MAX_SLICES) for name in ("value", "column", "start")),
        ("padding", np.int64, 3),
    ]
)
"""Table entry, 192 bytes: by slice, first tile, elements of every tile but the last, offset in the pool or -1."""


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """A sparse matrix that is added to the projection.

    Attributes:
        num_nonzeros: Entries that are stored.
        scaling: Factor on S x, fp32 in the device table.
    """

    kind: ClassVar[str] = SPARSE_DELTA
    num_nonzeros: int
    scaling: float = 1.0

    @property
    def size(self) -> int:
        """The number of non-zeros."""
        return self.num_nonzeros


class SparseDeltaKind:
    """See `PartKind`; the tensors of a part are values ``[nnz]`` fp32, columns ``[nnz]`` and starts ``[out_features + 1]``, int32.

    Values are ordered by output, then by column: output n has values ``[starts[n], starts[n + 1])``.
    """

    name: str = SPARSE_DELTA
    part: type[SparseDelta] = SparseDelta
    entries: Mapping[int, Entry] = MappingProxyType(
        {
            KIND_VALUES: Entry("values", True),
            KIND_COLUMNS: Entry("columns", True, "uint16"),
            KIND_STARTS: Entry("starts", True, "int32"),
        }
    )
    table_dtype: np.dtype[np.void] = SPARSE_DTYPE
    tile_fields: tuple[str, ...] = ("value_first", "column_first", "start_first")

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """See `PartKind`."""
        return {"values": (size,), "columns": (size,), "starts": (projection.out_features + 1,)}

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`: a rank's non-zeros, and as many zeros behind them as the other ranks have non-zeros.

        So the size of a rank's image follows from the spec alone. The zeros belong to its last output and its first column.
        """
        if tp_degree == 1:
            return arrays
        values, columns, starts = arrays
        each = np.arange(len(values), dtype=np.int32)
        by_output = [each[starts[n] : starts[n + 1]] for n in range(projection.out_features)]
        first = 0
        if projection.split is Split.INPUTS:
            width = projection.local_shape(tp_degree)[0]
            first = tp_rank * width
            own = (columns >= first) & (columns < first + width)
            by_output = [places[own[places]] for places in by_output]
        else:
            by_output = [places for part in projection.local_outputs(tp_rank, tp_degree) for places in by_output[part]]
        kept = np.concatenate(by_output)
        local_values, local_columns = np.zeros_like(values), np.zeros_like(columns)
        local_values[: len(kept)], local_columns[: len(kept)] = values[kept], columns[kept] - first
        ends = np.cumsum([0, *(len(places) for places in by_output)], dtype=starts.dtype)
        ends[-1] = len(values)
        return local_values, local_columns, ends

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """See `PartKind`: per slice the values, the columns, the starts.

        Raises:
            ImageError: If the projection has more columns than their type counts.
        """
        local = op.local_outputs(geometry.tp_degree)
        for index, (projection, size) in enumerate(zip(op.projections, sizes, strict=True)):
            if not size:
                continue
            what = f"layer {layer} {projection.name}: sparse delta"
            if projection.in_features > MAX_COLUMNS:
                raise ImageError(f"{what} has {projection.in_features} columns, at most {MAX_COLUMNS} are served")
            lengths = {KIND_VALUES: size, KIND_COLUMNS: size, KIND_STARTS: local[index] + 1}
            for entry, length in lengths.items():
                for start, stop in cut(geometry, length, 1, what, self.entries[entry].item_bytes(geometry.dtype)):
                    yield Tile(entry, index, start, 1, stop - start)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[Any]) -> None:
        """See `PartKind`."""
        part = parts[tile.slice]
        assert part is not None
        out[0] = part[tile.entry - KIND_VALUES][tile.start : tile.start + tile.cols]

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """See `PartKind`."""
        for entry, name in ((KIND_VALUES, "value"), (KIND_COLUMNS, "column"), (KIND_STARTS, "start")):
            mine = matrices.tiles["kind"] == entry
            tiles = matrices.tiles[mine]
            at = (tiles["layer"], tiles["op"], tiles["slice"])
            entries[f"{name}_first"][at], entries[f"{name}_step"][at] = matrices.numbers[mine], tiles["cols"]
            entries[f"{name}_offset"][at] = matrices.offsets[mine]

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[SparseDelta]
    ) -> None:
        """See `PartKind`."""
        entries["count"][places] = [part.num_nonzeros for part in parts]
        entries["scaling"][places] = [part.scaling for part in parts]
