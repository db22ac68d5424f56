"""What a kind of adapter part has to declare: its numbers, tensors, tiles and the entry of the device table.

An adapter's module is a set of *parts*, at most one of each kind; ADR 26 has the algebra that they make up. A kind is one
class with this protocol, listed in `loraplex_common.adapter_parts.KINDS`. Layout, packing and tables know no kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraplex_common.image_geometry import ITEM_BYTES, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loraplex_common.image_geometry import Geometry
    from loraplex_common.projections import Op, Projection

# Columns and outputs are cut at multiples of the first of these that fits a tile: of 64, so that tiles stay aligned without
# padding; of less where the (stacked) rank is so large that 64 exceed a tile; of a vector of 16 bytes at least.
TILE_STEPS: Final = (64, 32, 16, 8, 4)
VECTOR_BYTES: Final = 16

Arrays: TypeAlias = tuple[NDArray[Any], ...]
"""The tensors of one part, fp32, or integers for an entry of integers; in the order of `PartKind.shapes`."""

EntryType: TypeAlias = Literal["compute", "float32", "int32", "uint16"]
"""Elements of an image entry: of the engine's compute dtype, or of one type in every image."""

FIXED_TYPES: Final[dict[EntryType, type[np.generic]]] = {"float32": np.float32, "int32": np.int32, "uint16": np.uint16}


class Part(Protocol):
    """One part of a module, as the spec holds it: a frozen dataclass whose fields go into the spec's JSON."""

    kind: ClassVar[str]

    @property
    def size(self) -> int:
        """What the layout depends on besides the projection: a rank, a number of non-zeros, 1 for a vector."""
        ...


class Tile(NamedTuple):
    """A piece of a part, before it has a place.

    Attributes:
        entry: Which of the kind's image entries it is a piece of; the ``kind`` of `TILE_DTYPE`.
        slice: Slice of the op; 0 for what all slices share.
        start: First column or output in it.
        rows: Rows, as the kernels read it.
        cols: Columns, as the kernels read it.
    """

    entry: int
    slice: int
    start: int
    rows: int
    cols: int


class Entry(NamedTuple):
    """One sort of matrix that a kind puts into an image.

    Attributes:
        name: Its name in messages.
        is_per_slice: Whether each slice of an op has its own; else there is one for all of them.
        dtype: Its elements. Factors are fp32 everywhere: in bf16 a factor near 1 would keep 8 bits.
        is_cut_by_rows: Whether its tiles are rows of the matrix, so that two that follow each other make a larger one.
    """

    name: str
    is_per_slice: bool
    dtype: EntryType = "compute"
    is_cut_by_rows: bool = False

    def item_bytes(self, compute_dtype: str) -> int:
        """Return the bytes of an element in an image of that compute dtype."""
        return ITEM_BYTES[compute_dtype] if self.dtype == "compute" else np.dtype(FIXED_TYPES[self.dtype]).itemsize

    @property
    def is_integer(self) -> bool:
        """Whether its elements are integers."""
        return self.dtype in ("int32", "uint16")


class Matrices(NamedTuple):
    """Where a kind's matrices of one adapter lie, for its entries in the device table; one row for each matrix.

    Attributes:
        tiles: ``[matrices]`` of `TILE_DTYPE`; the first tile of each.
        numbers: Number of that tile, counted from the adapter's first.
        offsets: Bytes in the pool where a matrix begins whose tiles lie behind each other there; -1 for other ones.
    """

    tiles: NDArray[np.void]
    numbers: NDArray[np.intp]
    offsets: NDArray[np.int64]


class PartKind(Protocol):
    """One kind of part.

    Attributes:
        name: Its name in specs and tensors.
        part: The dataclass that describes one.
        entries: What it puts into an image, by number: ``kind`` in `TILE_DTYPE`, of no other kind.
        table_dtype: One entry of its device table, as its kernels read it.
        tile_fields: Fields of it that hold tile numbers; they count from the adapter's first tile until it is bound.
    """

    name: str
    part: type[Any]
    entries: Mapping[int, Entry]
    table_dtype: np.dtype[np.void]
    tile_fields: tuple[str, ...]

    def shapes(self, projection: Projection, size: int) -> Mapping[str, tuple[int, ...]]:
        """Return the unsharded shape of each tensor of a part, by its name in messages."""
        ...

    def local(self, projection: Projection, arrays: Arrays, tp_rank: int, tp_degree: int) -> Arrays:
        """Return views of what one tensor-parallel rank computes with."""
        ...

    def tiles(self, geometry: Geometry, layer: int, op: Op, sizes: Sequence[int]) -> Iterator[Tile]:
        """Cut the parts of one op into tiles, in the order of the image; only the first of a matrix has ``start`` 0.

        Args:
            geometry: Geometry of the image.
            layer: Decoder layer, for messages.
            op: The op.
            sizes: Size of each slice's part; 0 for a slice without one.

        Raises:
            ImageError: If a part does not fit; the message has layer, name and arithmetic.
        """
        ...

    def fill(self, tile: Tile, parts: Sequence[Arrays | None], out: NDArray[Any]) -> None:
        """Write a tile's values.

        Args:
            tile: One that `tiles` returned.
            parts: Each slice's local tensors; None for a slice without a part.
            out: ``[rows, cols]``, of the entry's type for integers, else fp32.

        Raises:
            ImageError: If the parts contradict each other.
        """
        ...

    def write_entries(self, entries: NDArray[np.void], matrices: Matrices) -> None:
        """Fill an adapter's rows of the device table with where its matrices lie.

        Args:
            entries: ``[layers, ops]`` of ``table_dtype``, zeros.
            matrices: The kind's matrices.
        """
        ...

    def write_numbers(
        self, entries: NDArray[np.void], places: tuple[NDArray[np.intp], ...], parts: Sequence[Any]
    ) -> None:
        """Add the parts' own numbers, such as a scaling, to the table.

        Args:
            entries: ``[layers, ops]`` of ``table_dtype``.
            places: Layers, ops and slices of the parts.
            parts: All of this kind, at least one.
        """
        ...


def own_outputs(projection: Projection, array: NDArray[Any], tp_rank: int, tp_degree: int) -> NDArray[Any]:
    """Return one rank's outputs, the first dimension, of a projection that ranks divide along them; a view if they lie together."""
    pieces = [array[outputs] for outputs in projection.local_outputs(tp_rank, tp_degree)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def least_columns(item_bytes: int) -> int:
    """Return the fewest columns or outputs of a tile that is one of several: what a vector of 16 bytes holds, 8 at most."""
    return max(min(VECTOR_BYTES // item_bytes, 8), TILE_STEPS[-1])


def cut(
    geometry: Geometry, length: int, unit_items: int, what: str, item_bytes: int | None = None
) -> list[tuple[int, int]]:
    """Cut ``length`` columns or outputs of ``unit_items`` elements each into half-open [start, stop) that fit a tile.

    Args:
        geometry: Geometry of the image.
        length: Columns or outputs.
        unit_items: Elements of each.
        what: For messages.
        item_bytes: Bytes of an element; the compute dtype's if unset.

    Raises:
        ImageError: If the least that a kernel reads at once exceeds a tile.
    """
    one = item_bytes or ITEM_BYTES[geometry.dtype]
    unit_bytes, fewest = unit_items * one, least_columns(one)
    for granule in TILE_STEPS:
        if granule >= fewest and (step := geometry.tile_bytes // unit_bytes // granule * granule):
            break
    else:
        if length * unit_bytes > geometry.tile_bytes:
            least = fewest * unit_bytes
            raise ImageError(
                f"{what}: {fewest} x {unit_bytes} = {least} bytes exceed a tile of {geometry.tile_bytes} bytes"
            )
        step = length
    return [(start, min(start + step, length)) for start in range(0, length, step)]
