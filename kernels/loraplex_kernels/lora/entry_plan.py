"""What the device tables' entries of all adapters with parts of the same sizes have in common."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from loraplex_common.adapter_image import TILE_ALIGN, layout
from loraplex_common.adapter_parts import KINDS

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.adapter_parts import PartSizes
    from numpy.typing import NDArray


class KindPlan(NamedTuple):
    """One kind's part of an `EntryPlan`.

    Attributes:
        matrices: Numbers of its matrices among all.
        tiles: First tile of each of them.
        places: Layers, ops and slices of its parts, in the order of the modules.
    """

    matrices: NDArray[np.intp]
    tiles: NDArray[np.void]
    places: tuple[NDArray[np.intp], ...]


class EntryPlan(NamedTuple):
    """What the entries of all adapters with parts of the same sizes have in common.

    Attributes:
        num_pages: Pages of the image.
        tiles: All tiles, in stream order.
        firsts: First tile of each matrix.
        strides: Bytes from one tile to the next of each matrix, where they lie one after another.
        kinds: By kind of part, those that the adapter has.
    """

    num_pages: int
    tiles: NDArray[np.void]
    firsts: NDArray[np.intp]
    strides: NDArray[np.int64]
    kinds: dict[str, KindPlan]


@functools.lru_cache(maxsize=256)
def entry_plan(geometry: Geometry, sizes: PartSizes) -> EntryPlan:
    """Return the plan of adapters whose parts have the given sizes; see `loraplex_common.adapter_image.layout`."""
    image = layout(geometry, sizes)
    firsts = np.flatnonzero(image.tiles["start"] == 0)
    item_bytes = {
        number: entry.item_bytes(geometry.dtype) for kind in KINDS.values() for number, entry in kind.entries.items()
    }
    heads = image.tiles[firsts]
    items = np.array([item_bytes[number] for number in heads["kind"].tolist()], dtype=np.int64)
    strides = -(-(heads["rows"].astype(np.int64) * heads["cols"] * items) // TILE_ALIGN) * TILE_ALIGN
    kinds = {}
    for kind in KINDS.values():
        matrices = np.flatnonzero(np.isin(image.tiles["kind"][firsts], list(kind.entries)))
        places = [
            (part.layer, *geometry.place(part.layer, part.projection)) for part in sizes if part.kind == kind.name
        ]
        if not places:
            continue
        columns = tuple(np.array(column, dtype=np.intp) for column in zip(*places, strict=True))
        kinds[kind.name] = KindPlan(matrices, image.tiles[firsts[matrices]], columns)
    return EntryPlan(image.num_pages, image.tiles, firsts, strides, kinds)


def undivided(plan: EntryPlan, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each matrix begins if its tiles lie one after another in the pool, else -1.

    Args:
        plan: The image's tiles.
        offsets: Offset of each tile in the pool, bytes.
    """
    tiles, firsts = plan.tiles, plan.firsts
    counts = np.diff(np.append(firsts, len(tiles)))
    numbers = np.arange(len(tiles)) - np.repeat(firsts, counts)
    expected = np.repeat(offsets[firsts], counts) + numbers * np.repeat(plan.strides, counts)
    undivided = np.logical_and.reduceat(offsets == expected, firsts) if len(firsts) else np.zeros(0, dtype=bool)
    return np.where(undivided, offsets[firsts], -1)
