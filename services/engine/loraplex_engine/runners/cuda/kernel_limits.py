"""Which models and sizes our kernels can compute, and the sizes that follow from a runner's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import TILE_BYTES

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry

    from loraplex_engine.pool_geometry import PoolGeometry

HEAD_DIMS: Final = (64, 80, 96, 128, 256)  # what the attention kernels are written for


def require_kernels(pool: PoolGeometry) -> None:
    """Return if our kernels can compute over such pages.

    Raises:
        ValueError: If they cannot; the message names the backend that can.
    """
    if pool.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"our kernels take heads of {' or '.join(map(str, HEAD_DIMS))} dimensions, this model has {pool.head_dim}: "
            "use --backend torch"
        )
    if pool.page_bytes < TILE_BYTES:
        raise ValueError(
            f"pages of {pool.page_bytes} bytes are smaller than a tile of {TILE_BYTES}: our kernels read tiles of at least "
            "64 outputs, which high ranks would then not have; use --backend torch"
        )


def tile_capacity(geometry: Geometry, *, num_pages: int, max_adapters: int) -> int:
    """Return how many tiles the adapters that fit a pool can have.

    A matrix of at most a tile has one; larger ones are cut into tiles that are at least half full.
    """
    tile_bytes = min(TILE_BYTES, geometry.page_bytes)
    if max_adapters == 0:
        return 0
    # A and e of each op; B, c and b of each projection, of a sparse delta the values, columns and starts, FLoRA's A and B.
    num_matrices = sum(8 * len(layer) + 2 * len({each.op for each in layer}) for layer in geometry.layers)
    small = min(max_adapters, num_pages) * num_matrices
    return small + num_pages * (2 * geometry.page_bytes // tile_bytes)
