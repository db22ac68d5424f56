"""The low-rank pair, the part that LoRA adds to a projection: ``y += scaling * B A x``.

Per op, an image holds first the A tiles, then the B tiles:

* **A tile** ``[R][k]``, row-major: columns ``[start, start + k)`` of the A matrices of all slices of the op, stacked
  (``R`` = sum of the slices' ranks), so that one pass over ``x`` serves q, k and v together. A slice without a pair takes
  no rows: with q and v but no k, v's rows follow q's.
* **B tile** ``[n][r]``, row-major: outputs ``[start, start + n)`` of one slice's B matrix with its own exact rank.

``k`` and ``n`` are multiples of 64 (of 32, 16 or 8, in fp32 also 4, where the rank is so large that 64 columns exceed a tile: more
than 256 stacked in bf16) except in the last tile of a matrix; with 64, neighbouring B tiles in a page are contiguous. The scaling is
not folded in: it is in the device table, fp32 (docs/lora-path.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from loraplex_common.part_kind import Arrays, Entry, Matrices, Tile, cut, own_outputs
from loraplex_common.projections import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection

LOW_RANK: Final = "low_rank"
KIND_A: Final = 0
KIND_B: Final = 1
MAX_SLICES: Final = 3  # kSlices
PAIR_DTYPE: Final = np.dtype(
    [
        ("a_first", np.int32),
        ("a_step", np.int32),
        ("stacked_rank", np.int32),
        ("reserved", np.int32),
        ("rank", np.int32, MAX_SLICES),
        ("b_first", np.int32, MAX_SLICES),
        ("b_step", np.int32, MAX_SLICES),
        ("scaling", np.float32, MAX_SLICES),
        ("a_offset", np.int64),
        ("b_offset", np.int64, MAX_SLICES),
    ]
)
"""One OpEntry of the kernels' csrc/lora/table.cuh, 96 bytes."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A pair of matrices A and B.

    Attributes:
        scaling: Factor on B·A·x: alpha / rank, or alpha / sqrt(rank) for rsLoRA; fp32 in the device table.
    """

    kind: ClassVar[str] = LOW_RANK
    rank: int
    scaling: float

    @property
    def size(self) -> int:
        """The rank."""
        return self.rank


class LowRankKind:
    """See `PartKind`; the tensors of a part are A ``[rank, in_features]`` and B ``[out_features, rank]``."""

    name: str = LOW_RANK
    part: type[LowRank] = LowRank
    entries: Mapping[int, Entry] = MappingProxyType(
        {KIND_A: Entry("A", False), KIND_B: Entry("B", True, is_cut_by_rows=True)}
    )
    table_dtype: np.dtype[np.void] = PAIR_DTYPE
    tile_fields: tuple[str, ...] = ("a_first", "b_first")

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """See `PartKind`."""
        return {"lora_A": (size, projection.in_features), "lora_B": (projection.out_features, size)}

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`: A is cut where ranks divide the input, B where they divide the output."""
        return local_pair(projection, arrays, tp_rank, tp_degree)

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """See `PartKind`: A, then each slice's B."""
        stacked, columns = sum(sizes), op.local_columns(geometry.tp_degree)
        for start, stop in cut(geometry, columns, stacked, f"layer {layer} {op.name}: stacked rank {stacked}"):
            yield Tile(KIND_A, 0, start, stacked, stop - start)
        for index, (outputs, rank) in enumerate(zip(op.local_outputs(geometry.tp_degree), sizes, strict=True)):
            if rank:
                what = f"layer {layer} {op.projections[index].name}: rank {rank}"
                for start, stop in cut(geometry, outputs, rank, what):
                    yield Tile(KIND_B, index, start, stop - start, rank)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[np.float32]) -> None:
        """See `PartKind`."""
        if tile.entry == KIND_B:
            part = parts[tile.slice]
            assert part is not None
            out[:] = part[1][tile.start : tile.start + tile.rows]
            return
        stop = tile.start + tile.cols
        first = 0
        for part in parts:
            if part is not None:
                a = part[0]
                out[first : first + len(a)] = a[:, tile.start : stop]
                first += len(a)

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """See `PartKind`."""
        is_a = matrices.tiles["kind"] == KIND_A
        a, b = matrices.tiles[is_a], matrices.tiles[~is_a]
        at_a, at_b = (a["layer"], a["op"]), (b["layer"], b["op"], b["slice"])
        entries["a_first"][at_a], entries["a_step"][at_a] = matrices.numbers[is_a], a["cols"]
        entries["stacked_rank"][at_a], entries["a_offset"][at_a] = a["rows"], matrices.offsets[is_a]
        entries["b_first"][at_b], entries["b_step"][at_b] = matrices.numbers[~is_a], b["rows"]
        entries["rank"][at_b], entries["b_offset"][at_b] = b["cols"], matrices.offsets[~is_a]

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[LowRank]
    ) -> None:
        """See `PartKind`."""
        entries["scaling"][places] = [part.scaling for part in parts]


def local_pair(projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
    """Return views of what one tensor-parallel rank computes with of A ``[rank, in]`` and B ``[out, rank]``."""
    a, b = arrays
    columns = projection.local_shape(tp_degree)[0]
    if projection.split is Split.INPUTS:
        return a[:, tp_rank * columns : (tp_rank + 1) * columns], b
    return a, own_outputs(projection, b, tp_rank, tp_degree)
