"""Writes an adapter's tensors into its image: layer by layer, in any order, from several threads at once.

Values that the checkpoint has in the type of the image are copied, and never converted. Tiles that follow each other in the
source and in the image are copied as one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from loraplex_common.adapter_parts import KINDS, AdapterSpec, PartSizes
from loraplex_common.bfloat16 import from_bfloat16, is_finite, round_into
from loraplex_common.image_geometry import ITEM_BYTES, Geometry, ImageError
from loraplex_common.image_layout import layout
from loraplex_common.part_kind import FIXED_TYPES, Arrays, Entry, EntryType, PartKind, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tensors: TypeAlias = Mapping[tuple[int, str, str], Arrays]
"""(layer, projection, kind of part) -> its tensors, unsharded: of a pair A and B. fp32, fp16, or uint16, which stands for the
bits of bf16; integers where the kind has them."""

BFLOAT16: Final = np.dtype(np.uint16)
"""The type in which bf16 travels through numpy."""
_LARGEST_COPY: Final = 1 << 18
"""Items that are checked at once, so that the check's scratch stays in a core's cache."""

_Key: TypeAlias = tuple[int, int]
"""(op, image entry)."""


class _Run(NamedTuple):
    """Tiles of one matrix that lie behind each other in the image and are one piece of it.

    Attributes:
        whole: All of them as one tile.
        tiles: Each, with its first byte in the image.
    """

    op: int
    whole: Tile
    at: int
    tiles: tuple[tuple[Tile, int], ...]


class _Source(NamedTuple):
    """What one op's parts of one kind are made of.

    Attributes:
        parts: Each slice's local tensors; None for a slice without a part.
        is_copied: Whether they have the type of the image already.
    """

    kind: PartKind
    parts: Sequence[Arrays | None]
    is_copied: bool


class ImagePacker:
    """Writes the image of one adapter for one tensor-parallel rank.

    Args:
        geometry: Geometry of the image.
        spec: The adapter.
        tp_rank: The rank.

    Attributes:
        num_pages: Pages of the image.
        pages_of: Layer -> the half-open range of pages that its tiles lie in.

    Raises:
        ImageError: If the adapter cannot be laid out, or there is no such rank.
    """

    def __init__(self, geometry: Geometry, spec: AdapterSpec, tp_rank: int = 0) -> None:
        if not 0 <= tp_rank < geometry.tp_degree:
            raise ImageError(f"tensor-parallel rank {tp_rank} does not exist: the degree is {geometry.tp_degree}")
        self._geometry = geometry
        self._tp_rank = tp_rank
        self._runs, self._gaps = _runs(geometry, spec.sizes), _gaps(geometry, spec.sizes)
        self._sizes: dict[int, list[tuple[str, str, int]]] = {}
        for layer, projection, kind, size in spec.sizes:
            self._sizes.setdefault(layer, []).append((projection, kind, size))
        self.num_pages = layout(geometry, spec.sizes).num_pages
        self.pages_of = {layer: _pages(geometry, runs) for layer, runs in self._runs.items()}

    def empty_image(self) -> NDArray[np.uint8]:
        """Return an image ``[num_pages, page_bytes]``, uint8, in which all that belongs to no tile is zero."""
        image = np.empty((self.num_pages, self._geometry.page_bytes), dtype=np.uint8)
        for page in range(self.num_pages):
            self.clear_gaps(page, image)
        return image

    def clear_gaps(self, page: int, image: NDArray[np.uint8]) -> None:
        """Write zeros where a page has no tile; for memory that held something else before."""
        for start, stop in self._gaps[page]:
            image[page, start:stop] = 0

    def pack_layer(
        self, layer: int, tensors: Tensors, image: NDArray[np.uint8], *, is_known_finite: bool = False
    ) -> None:
        """Write the tiles of one layer; layers may be written at the same time.

        Args:
            layer: The layer, a key of ``pages_of``.
            tensors: The layer's.
            image: What `empty_image` gave, or memory of that shape whose gaps `clear_gaps` clears.
            is_known_finite: Whether the same image was made before, so that no value needs to be looked at again.

        Raises:
            ImageError: If the tensors are not those that spec and geometry say, or a value is not finite in the dtype.
        """
        sources = self._sources(layer, tensors)
        writer = _TileWriter(self._geometry, image, is_known_finite=is_known_finite)
        for run in self._runs[layer]:
            source = sources[run.op, run.whole.entry]
            pieces = ((run.whole, run.at),) if source.is_copied else run.tiles
            for tile, at in pieces:
                if not writer.write(source, tile, at):
                    raise ImageError(self._not_finite(layer, run.op, tile, source.kind.entries[tile.entry]))

    def _sources(self, layer: int, tensors: Tensors) -> dict[_Key, _Source]:
        """Check the tensors' keys and shapes; return what the rank computes, as views wherever types allow it."""
        expected = {(layer, projection, kind) for projection, kind, _ in self._sizes[layer]}
        _check_keys(expected, set(tensors))
        geometry = self._geometry
        found: dict[tuple[int, str], list[Arrays | None]] = {}
        for name, kind_name, size in self._sizes[layer]:
            kind, projection, arrays = (
                KINDS[kind_name],
                geometry.projection(layer, name),
                tensors[layer, name, kind_name],
            )
            for (what, shape), array in zip(kind.shapes(projection, size).items(), arrays, strict=True):
                if array.shape != shape:
                    raise ImageError(f"layer {layer} {name} {what} has shape {array.shape}, expected {shape}")
            op, index = geometry.place(layer, name)
            parts = found.setdefault((op, kind_name), [None] * len(geometry.ops[op].projections))
            parts[index] = kind.local(projection, arrays, self._tp_rank, geometry.tp_degree)
        sources: dict[_Key, _Source] = {}
        for (op, kind_name), parts in found.items():
            kind = KINDS[kind_name]
            source = _source(kind, parts, geometry.dtype)
            sources |= {(op, entry): source for entry in kind.entries}
        return sources

    def _not_finite(self, layer: int, op: int, tile: Tile, entry: Entry) -> str:
        ops, (name, is_per_slice, dtype, _) = self._geometry.ops, entry
        which = f"{ops[op].slices[tile.slice]} {name}" if is_per_slice else name
        dtype_name = self._geometry.dtype if dtype == "compute" else dtype
        return f"layer {layer} {ops[op].name} {which} holds a value that is not finite in {dtype_name}"


def pack(geometry: Geometry, spec: AdapterSpec, tensors: Tensors, tp_rank: int = 0) -> NDArray[np.uint8]:
    """Build an adapter's image for one tensor-parallel rank.

    Returns:
        ``[num_pages, page_bytes]``, uint8; bytes that belong to no tile are zero.

    Raises:
        ImageError: If the tensors are not those that spec and geometry say, or a value is not finite in the dtype.
    """
    packer = ImagePacker(geometry, spec, tp_rank)
    _check_keys({(layer, projection, kind) for layer, projection, kind, _ in spec.sizes}, set(tensors))
    image = packer.empty_image()
    by_layer: dict[int, dict[tuple[int, str, str], Arrays]] = {}
    for key, arrays in tensors.items():
        by_layer.setdefault(key[0], {})[key] = arrays
    for layer, found in by_layer.items():
        packer.pack_layer(layer, found, image)
    return image


def _check_keys(expected: set[tuple[int, str, str]], found: set[tuple[int, str, str]]) -> None:
    if different := sorted(expected ^ found):
        raise ImageError(f"layer {different[0][0]} {different[0][1]}: in only one of spec and tensors")


def _source(kind: PartKind, parts: Sequence[Arrays | None], compute_dtype: str) -> _Source:
    """Decide whether parts are copied as they are; those that are not are widened to fp32 if they are bf16."""
    floats = [
        array.dtype for part in parts if part for array in part if array.dtype.kind == "f" or array.dtype == BFLOAT16
    ]
    if not any(dtype == BFLOAT16 for dtype in floats):
        return _Source(kind, parts, compute_dtype == "float32")
    only_compute = all(entry.is_integer or entry.dtype == "compute" for entry in kind.entries.values())
    if compute_dtype == "bfloat16" and only_compute and all(dtype == BFLOAT16 for dtype in floats):
        return _Source(kind, parts, is_copied=True)
    return _Source(
        kind, [None if part is None else tuple(map(_widened, part)) for part in parts], compute_dtype == "float32"
    )


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return from_bfloat16(array) if array.dtype == BFLOAT16 else array


class _TileWriter:
    """Writes tiles into an image in the types of their entries; its scratch serves all tiles."""

    def __init__(self, geometry: Geometry, image: NDArray[np.uint8], *, is_known_finite: bool) -> None:
        self._is_known_finite = is_known_finite
        num_items = geometry.tile_bytes // ITEM_BYTES["bfloat16"]
        self._stack, self._scratch = np.empty(num_items, dtype=np.float32), np.empty(num_items, dtype=np.uint32)
        flat = image.reshape(-1)
        self._views: dict[EntryType, NDArray[Any]] = {name: flat.view(dtype) for name, dtype in FIXED_TYPES.items()}
        self._views["compute"] = flat.view(BFLOAT16 if geometry.dtype == "bfloat16" else np.float32)

    def write(self, source: _Source, tile: Tile, at: int) -> bool:
        """Write one tile at a byte of the image; return whether all its values are finite there."""
        kind, parts, is_copied = source
        entry, count = kind.entries[tile.entry], tile.rows * tile.cols
        view, shape = self._views[entry.dtype], (tile.rows, tile.cols)
        out = view[at // view.itemsize : at // view.itemsize + count]
        if entry.is_integer:
            kind.fill(tile, parts, out.reshape(shape))
            return True
        if is_copied or out.dtype == np.float32:
            kind.fill(tile, parts, out.reshape(shape))
            return self._is_known_finite or _is_finite(out)
        values = self._stack[:count]
        kind.fill(tile, parts, values.reshape(shape))
        round_into(values, out, self._scratch[:count])
        return self._is_known_finite or is_finite(out)


def _is_finite(values: NDArray[Any]) -> bool:
    pieces = (values[start : start + _LARGEST_COPY] for start in range(0, values.size, _LARGEST_COPY))
    if values.dtype == BFLOAT16:
        return all(is_finite(piece) for piece in pieces)
    return all(bool(np.isfinite(piece).all()) for piece in pieces)


@functools.lru_cache(maxsize=64)
def _runs(geometry: Geometry, sizes: PartSizes) -> dict[int, list[_Run]]:
    """Return, by layer, the tiles of a layout joined to runs."""
    found: dict[int, list[_Run]] = {}
    entries = {number: entry for kind in KINDS.values() for number, entry in kind.entries.items()}
    for layer, op, *fields, page, offset in layout(geometry, sizes).tiles.tolist():
        tile, at = Tile(*fields), page * geometry.page_bytes + offset
        runs = found.setdefault(layer, [])
        if runs and (
            joined := _joined(runs[-1], op, tile, at, entries[tile.entry].item_bytes(geometry.dtype), entries)
        ):
            runs[-1] = joined
        else:
            runs.append(_Run(op, tile, at, ((tile, at),)))
    return found


def _joined(run: _Run, op: int, tile: Tile, at: int, item_bytes: int, entries: Mapping[int, Entry]) -> _Run | None:
    """Return a run with one more tile; None if the tile is not what follows it, in its matrix and in the image."""
    whole = run.whole
    if (op, tile.entry, tile.slice, tile.cols) != (run.op, whole.entry, whole.slice, whole.cols):
        return None
    is_next = tile.start == whole.start + whole.rows and at == run.at + whole.rows * whole.cols * item_bytes
    if not entries[tile.entry].is_cut_by_rows or not is_next:
        return None
    return _Run(op, whole._replace(rows=whole.rows + tile.rows), run.at, (*run.tiles, (tile, at)))


@functools.lru_cache(maxsize=64)
def _gaps(geometry: Geometry, sizes: PartSizes) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return, by page, the half-open ranges of its bytes that belong to no tile."""
    plan = layout(geometry, sizes)
    item_bytes = {
        number: entry.item_bytes(geometry.dtype) for kind in KINDS.values() for number, entry in kind.entries.items()
    }
    found: list[list[tuple[int, int]]] = [[] for _ in range(plan.num_pages)]
    begun = [0] * plan.num_pages
    items = np.array([item_bytes[kind] for kind in plan.tiles["kind"].tolist()], dtype=np.int64)
    lengths = plan.tiles["rows"].astype(np.int64) * plan.tiles["cols"] * items
    for page, start, length in zip(
        plan.tiles["page"].tolist(), plan.tiles["offset"].tolist(), lengths.tolist(), strict=True
    ):
        if begun[page] < start:
            found[page].append((begun[page], start))
        begun[page] = start + length
    for page, stop in enumerate(begun):
        if stop < geometry.page_bytes:
            found[page].append((stop, geometry.page_bytes))
    return tuple(map(tuple, found))


def _pages(geometry: Geometry, runs: Sequence[_Run]) -> range:
    """Return the pages that a layer's runs lie in; they are neighbours, as layers follow each other."""
    return range(runs[0].at // geometry.page_bytes, runs[-1].tiles[-1][1] // geometry.page_bytes + 1)
