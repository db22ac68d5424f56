"""The parts that are one vector per projection: a factor on outputs (c), a factor on inputs (e), a bias (b).

ADR 26 has the algebra. All three lie in images as fp32: in bf16 a factor near 1 would keep 8 bits.

* **c** ``[1][n]`` tiles per slice: outputs ``[start, start + n)``. For DoRA the values are the magnitudes m, which an engine
  replaces by ``c = m / ||W + scaling B A||`` (norm of each row), as only it has W.
* **e** ``[1][k]`` tiles, one row per op: the slices of an op share their input, so they have to share e.
* **b** ``[1][n]`` tiles per slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import numpy as np

from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import MAX_SLICES
from loraplex_common.part_kind import Arrays, Entry, Matrices, Tile, cut, own_outputs
from loraplex_common.projections import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection

OUT_VECTOR: Final = "out_vector"
IN_VECTOR: Final = "in_vector"
BIAS: Final = "bias"
KIND_C: Final = 2
KIND_E: Final = 3
KIND_BIAS: Final = 4
ITEM: Final = 4

IS_MAGNITUDE: Final = 1
"""Bit of ``VECTOR_DTYPE.flags``: the engine computes c from the stored magnitudes."""
SCALES_BIAS: Final = 2
"""Bit of ``VECTOR_DTYPE.flags``: c multiplies the base's own bias too."""

VECTOR_DTYPE: Final = np.dtype(
    [
        ("first", np.int32, MAX_SLICES),  # number of the first tile
        ("flags", np.int32),
        ("step", np.int32, MAX_SLICES),  # outputs of every tile but the last; 0: the slice has no such vector
        ("reserved", np.int32),
        ("offset", np.int64, MAX_SLICES),  # in the pool, where the tiles lie behind each other; else -1
        ("padding", np.int64),
    ]
)
"""Table entry of c and of b, 64 bytes."""

IN_VECTOR_DTYPE: Final = np.dtype([("first", np.int32), ("step", np.int32), ("offset", np.int64)])
"""Table entry of e, 16 bytes; as `VECTOR_DTYPE` for the one vector that all slices share."""


@dataclass(frozen=True, slots=True)
class OutVector:
    """A factor on each output, behind the pairs: ``c * (W (e * x) + sum of pairs)``.

    Attributes:
        is_magnitude: The values are DoRA's magnitudes; engines compute c from them.
        scales_bias: c multiplies the base's own bias too, as (IA)3 does; DoRA leaves it alone.
    """

    kind: ClassVar[str] = OUT_VECTOR
    is_magnitude: bool = False
    scales_bias: bool = False

    @property
    def size(self) -> int:
        """1: it is as long as the projection's output."""
        return 1


@dataclass(frozen=True, slots=True)
class InVector:
    """A factor on each input of the base's product, not of the pairs': ``W (e * x)``."""

    kind: ClassVar[str] = IN_VECTOR

    @property
    def size(self) -> int:
        """1: it is as long as the projection's input."""
        return 1


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias that comes on top of the base's own."""

    kind: ClassVar[str] = BIAS

    @property
    def size(self) -> int:
        """1: it is as long as the projection's output."""
        return 1


VectorPart: TypeAlias = OutVector | Bias


class _OutputKind:
    """What kinds with one vector ``[out_features]`` per slice have in common."""

    entry: ClassVar[int]
    table_dtype: np.dtype[np.void] = VECTOR_DTYPE
    tile_fields: tuple[str, ...] = ("first",)
    tensor: ClassVar[str]

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """See `PartKind`."""
        del size
        return {self.tensor: (projection.out_features,)}

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """See `PartKind`."""
        for index, (outputs, size) in enumerate(zip(op.local_outputs(geometry.tp_degree), sizes, strict=True)):
            if size:
                what = f"layer {layer} {op.slices[index]}: {self.tensor}"
                for start, stop in cut(geometry, outputs, 1, what, ITEM):
                    yield Tile(self.entry, index, start, 1, stop - start)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[Any]) -> None:
        """See `PartKind`."""
        part = parts[tile.slice]
        assert part is not None
        out[0] = part[0][tile.start : tile.start + tile.cols]

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """See `PartKind`."""
        tiles = matrices.tiles
        at = (tiles["layer"], tiles["op"], tiles["slice"])
        entries["first"][at], entries["step"][at] = matrices.numbers, tiles["cols"]
        entries["offset"][at] = matrices.offsets


class OutVectorKind(_OutputKind):
    """See `PartKind`; the one tensor of a part is c ``[out_features]``, or DoRA's magnitudes."""

    name: str = OUT_VECTOR
    part: type[OutVector] = OutVector
    entry = KIND_C
    tensor = "c"
    entries: Mapping[int, Entry] = MappingProxyType({KIND_C: Entry("c", True, "float32")})

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`: multiplication by c distributes over partial sums, so each rank has the c of its outputs."""
        return arrays if projection.split is Split.INPUTS else _own_outputs(projection, arrays, tp_rank, tp_degree)

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[OutVector]
    ) -> None:
        """See `PartKind`; an op's slices share the flags of which each adapter has one value."""
        flags = [IS_MAGNITUDE * part.is_magnitude + SCALES_BIAS * part.scales_bias for part in parts]
        entries["flags"][places[:2]] = flags


class BiasKind(_OutputKind):
    """See `PartKind`; the one tensor of a part is b ``[out_features]``."""

    name: str = BIAS
    part: type[Bias] = Bias
    entry = KIND_BIAS
    tensor = "bias"
    entries: Mapping[int, Entry] = MappingProxyType({KIND_BIAS: Entry("bias", True, "float32")})

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`: where ranks divide the input, each has a partial sum, and rank 0 alone adds b."""
        if projection.split is Split.INPUTS:
            return arrays if tp_rank == 0 else (np.zeros_like(arrays[0]),)
        return _own_outputs(projection, arrays, tp_rank, tp_degree)

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[Bias]
    ) -> None:
        """See `PartKind`: there are none."""
        del entries, places, parts


class InVectorKind:
    """See `PartKind`; the one tensor of a part is e ``[in_features]``."""

    name: str = IN_VECTOR
    part: type[InVector] = InVector
    entries: Mapping[int, Entry] = MappingProxyType({KIND_E: Entry("e", False, "float32")})
    table_dtype: np.dtype[np.void] = IN_VECTOR_DTYPE
    tile_fields: tuple[str, ...] = ("first",)

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """See `PartKind`."""
        del size
        return {"e": (projection.in_features,)}

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """See `PartKind`."""
        if projection.split is Split.OUTPUTS:
            return arrays
        columns = projection.local_shape(tp_degree)[0]
        return (arrays[0][tp_rank * columns : (tp_rank + 1) * columns],)

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """See `PartKind`: one vector, which every slice has to have."""
        if not all(sizes):
            without = ", ".join(name for name, size in zip(op.slices, sizes, strict=True) if not size)
            raise ImageError(
                f"layer {layer} {op.name}: its projections share one input, but {without} does not scale it as the others do"
            )
        columns = op.local_columns(geometry.tp_degree)
        for start, stop in cut(geometry, columns, 1, f"layer {layer} {op.name}: e", ITEM):
            yield Tile(KIND_E, 0, start, 1, stop - start)

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[Any]) -> None:
        """See `PartKind`."""
        vectors = [part[0] for part in parts if part is not None]
        if any(not np.array_equal(vectors[0], other) for other in vectors[1:]):
            raise ImageError("projections that share one input scale it differently")
        out[0] = vectors[0][tile.start : tile.start + tile.cols]

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """See `PartKind`."""
        tiles = matrices.tiles
        at = (tiles["layer"], tiles["op"])
        entries["first"][at], entries["step"][at] = matrices.numbers, tiles["cols"]
        entries["offset"][at] = matrices.offsets

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[InVector]
    ) -> None:
        """See `PartKind`: there are none."""
        del entries, places, parts


def _own_outputs(projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
    return (own_outputs(projection, arrays[0], tp_rank, tp_degree),)
