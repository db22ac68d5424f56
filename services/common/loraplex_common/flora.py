"""FLoRA, per-example multiplicative adaptation (arXiv:2312.05677): ``y = (W o (B A)) x``, o being the elementwise product.

That is ``sum over r of B_r * (W (A_r * x))``: r passes over W, each with a factor on its inputs and one on its outputs. It takes
the place of the base's product ``W x``; the base's own bias is added unscaled. Ranks are small, as each costs a pass over W.

Per op, an image holds for each slice the A tiles, then the B tiles, fp32 as all factors:

* **A tile** ``[r][k]``, row-major: columns ``[start, start + k)`` of A.
* **B tile** ``[r][n]``, row-major: outputs ``[start, start + n)`` of B, transposed, so that a pass reads its factors in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import MAX_SLICES, local_pair
from loraplex_common.part_kind import Arrays, Entry, Matrices, Tile, cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection

FLORA: Final = "flora"
KIND_FLORA_A: Final = 8
KIND_FLORA_B: Final = 9
MAX_FLORA_RANK: Final = 8
"""A row with FLoRA reads the projection's weights once for each rank."""
ITEM: Final = 4

FLORA_DTYPE: Final = np.dtype(
    [
        ("rank", np.int32, MAX_SLICES),  # 0: the slice has none
        ("reserved", np.int32),
        ("a_first", np.int32, MAX_SLICES),
        ("a_step", np.int32, MAX_SLICES),
        ("b_first", np.int32, MAX_SLICES),
        ("b_step", np.int32, MAX_SLICES),
        ("a_offset", np.int64, MAX_SLICES),
        ("b_offset", np.int64, MAX_SLICES),
    ]
)
"""Table entry, 112 bytes: by slice, first tile, columns or outputs of every tile but the last, offset in the pool or -1."""


@dataclass(frozen=True, slots=True)
class Flora:
    """A multiplicative adaptation ``W o (B A)`` of a projection.

    Attributes:
        rank: Rank of B A, at most `MAX_FLORA_RANK`.
    """

    kind: ClassVar[str] = FLORA
    rank: int

    @property
    def size(self) -> int:
        """The rank."""
        return self.rank


class FloraKind:
    """See `PartKind`; the tensors of a part are A ``[rank, in_features]`` and B ``[out_features, rank]``."""

    name: str = FLORA
    part: type[Flora] = Flora
    entries: Mapping[int, Entry] = MappingProxyType(
        {KIND_FLORA_A: Entry("flora A", True, "float32"), KIND_FLORA_B: Entry("flora B", True, "float32")}
    )
    table_dtype: np.dtype[np.void] = FLORA_DTYPE
    tile_fields: tuple[str, ...] = ("a_first", "b_first")

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """See `PartKind`."""
        return {"flora_A": (size, projection.in_features), "flora_B": (projection.out_features, size)}

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`: A is cut where ranks divide the input, B where they divide the output; partial sums add up."""
        return local_pair(projection, arrays, tp_rank, tp_degree)

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """See `PartKind`: each slice's A, then its B."""
        columns = op.local_columns(geometry.tp_degree)
        for index, (outputs, rank) in enumerate(zip(op.local_outputs(geometry.tp_degree), sizes, strict=True)):
            if not rank:
                continue
            what = f"layer {layer} {op.slices[index]}: FLoRA of rank {rank}"
            if rank > MAX_FLORA_RANK:
                raise ImageError(
                    f"{what}: each rank costs a pass over the weights; at most {MAX_FLORA_RANK} are served: train with a "
                    "smaller rank"
                )
            for entry, length in ((KIND_FLORA_A, columns), (KIND_FLORA_B, outputs)):
                for start, stop in cut(geometry, length, rank, what, ITEM):
                    yield Tile(entry, index, start, rank, stop - start)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[np.float32]) -> None:
        """See `PartKind`."""
        part = parts[tile.slice]
        assert part is not None
        a, b = part
        matrix = a if tile.entry == KIND_FLORA_A else b.T
        out[:] = matrix[:, tile.start : tile.start + tile.cols]

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """See `PartKind`."""
        for entry, name in ((KIND_FLORA_A, "a"), (KIND_FLORA_B, "b")):
            mine = matrices.tiles["kind"] == entry
            tiles = matrices.tiles[mine]
            at = (tiles["layer"], tiles["op"], tiles["slice"])
            entries["rank"][at] = tiles["rows"]
            entries[f"{name}_first"][at], entries[f"{name}_step"][at] = matrices.numbers[mine], tiles["cols"]
            entries[f"{name}_offset"][at] = matrices.offsets[mine]

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[Flora]
    ) -> None:
        """See `PartKind`: there are none."""
        del entries, places, parts
