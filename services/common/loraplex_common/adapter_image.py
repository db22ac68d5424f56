"""The one definition of how an adapter lies in pages: packed by the store, read by the engine and its kernels.

An image is a stream of *tiles*. Per decoder layer, in the layer's order of fused projections ("ops"), and per op in the order
of `KINDS`, each kind of part contributes the tiles that it cuts its matrices into; `low_rank.py` says which for a pair.

A tile is at most ``min(32 KiB, page)``, starts on a 128-byte boundary and never straddles a page, so that kernels use
16-byte vectors or one bulk copy and a tile's address is (page id, offset). Waste: the end of each page and the last page.
Nothing here needs torch: numpy only. `image_layout.py` places the tiles, `image_packer.py` writes them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from loraplex_common.adapter_parts import KINDS, AdapterSpec, ModuleSpec, PartSizes, pair_sizes
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.image_geometry import (
    ITEM_BYTES,
    LAYOUT_VERSION,
    TILE_ALIGN,
    TILE_BYTES,
    Geometry,
    ImageError,
)
from loraplex_common.image_layout import TILE_DTYPE, ImageLayout, layout
from loraplex_common.image_packer import ImagePacker, Tensors, pack
from loraplex_common.low_rank import KIND_A, KIND_B, LOW_RANK
from loraplex_common.part_kind import FIXED_TYPES, TILE_STEPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ITEM_BYTES", "KIND_A", "KIND_B", "LAYOUT_VERSION", "LOW_RANK", "TILE_ALIGN", "TILE_BYTES", "TILE_DTYPE", "TILE_STEPS",
    "AdapterSpec", "Geometry", "ImageError", "ImageLayout", "ImagePacker", "ModuleSpec", "PartSizes", "Tensors",
    "from_bfloat16", "image_sha256", "layout", "pack", "pair_sizes", "tile_values", "to_bfloat16",
]  # fmt: skip


def tile_values(geometry: Geometry, image: NDArray[np.uint8], tile: np.void) -> NDArray[Any]:
    """Read one tile back as ``[rows, cols]``, integers as they are, else fp32; what kernels are tested against."""
    entry = next(kind.entries[int(tile["kind"])] for kind in KINDS.values() if int(tile["kind"]) in kind.entries)
    shape = (int(tile["rows"]), int(tile["cols"]))
    num_bytes = shape[0] * shape[1] * entry.item_bytes(geometry.dtype)
    raw = image[tile["page"], tile["offset"] : int(tile["offset"]) + num_bytes]
    if entry.dtype == "compute" and geometry.dtype == "bfloat16":
        return from_bfloat16(raw.view(np.uint16)).reshape(shape)
    return raw.view(FIXED_TYPES.get(entry.dtype, np.float32)).reshape(shape)


def image_sha256(image: NDArray[np.uint8]) -> str:
    """Return the sha256 of an image's pages in order, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
