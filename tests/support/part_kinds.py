"""A kind of part that only tests have: a per-output vector c, beside the ones that adapters have."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from loraplex_common.low_rank import MAX_SLICES
from loraplex_common.part_kind import Arrays, Entry, Matrices, Tile, cut
from loraplex_common.projections import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection
    from numpy.typing import NDArray

OUT_VECTOR = "test_vector"
KIND_C = 90


@dataclass(frozen=True, slots=True)
class OutVector:
    """A vector that scales outputs; ``strength`` stands for a number that only the table holds."""

    kind: ClassVar[str] = OUT_VECTOR
    strength: float

    @property
    def size(self) -> int:
        return 1


class OutVectorKind:
    """See `PartKind`; the one tensor is c ``[out_features]``, its tiles are ``[1][n]``."""

    name: str = OUT_VECTOR
    part: type[OutVector] = OutVector
    entries: Mapping[int, Entry] = MappingProxyType({KIND_C: Entry("c", is_per_slice=True)})
    table_dtype: np.dtype[np.void] = np.dtype(
        [
            ("first", np.int32, MAX_SLICES),
            ("step", np.int32, MAX_SLICES),
            ("strength", np.float32, MAX_SLICES),
            ("reserved", np.int32),
            ("offset", np.int64, MAX_SLICES),
        ]
    )
    tile_fields: tuple[str, ...] = ("first",)

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        return {"c": (projection.out_features,)}

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        outputs = projection.local_shape(tp_degree)[1]
        return arrays if projection.split is Split.INPUTS else (arrays[0][tp_rank * outputs : (tp_rank + 1) * outputs],)

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        for index, (outputs, size) in enumerate(zip(op.local_outputs(geometry.tp_degree), sizes, strict=True)):
            if size:
                for start, stop in cut(geometry, outputs, 1, f"layer {layer} {op.slices[index]}: c"):
                    yield Tile(KIND_C, index, start, 1, stop - start)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[np.float32]) -> None:
        part = parts[tile.slice]
        assert part is not None
        out[0] = part[0][tile.start : tile.start + tile.cols]

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        tiles = matrices.tiles
        at = (tiles["layer"], tiles["op"], tiles["slice"])
        entries["first"][at], entries["step"][at] = matrices.numbers, tiles["cols"]
        entries["offset"][at] = matrices.offsets

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[OutVector]
    ) -> None:
        entries["strength"][places] = [part.strength for part in parts]
