"""Sizes of the CUDA backend, and what they must not be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import TILE_BYTES
from loraplex_common.base_model import BaseModelInfo

from loraplex_engine.pool_geometry import PoolGeometry
from loraplex_engine.step import MIN_DECODE_RUNS

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry

HEAD_DIMS: Final = (64, 128)  # what the attention kernels are written for


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaRunnerConfig:
    """What a `CudaRunner` is built from.

    Attributes:
        num_pages: Pages of the pool, allocated at once.
        max_num_seqs: Slots.
        max_model_len: Longest sequence, in tokens.
        max_num_batched_tokens: Most tokens of one step.
        max_resident_adapters: Size of the adapter table; 0 switches LoRA off: no tables, kernels or graphs of it are
            made, and no plan may name an adapter. What LoRA costs those who do not use it is measured against that.
        min_decode_runs: In steps with prefill chunks, in bf16, decode rows that make so many runs of one adapter or more go
            through the decode kernels; else they are segments of the prefill kernel, as chunks are.
        device: Ordinal of the GPU.
        arch: Architecture to compile for; the GPU's own if None. ``compute_80`` runs the sm_80 code on a newer GPU.
        dependent_launch: Launch kernels programmatically dependent on those before them; if None, where the target can
            (sm_90 and up).
        jitter: Let kernels' warps idle at random, so that races show; for tests.
    """

    info: BaseModelInfo
    geometry: PoolGeometry
    num_pages: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    max_resident_adapters: int = 1024
    min_decode_runs: int = MIN_DECODE_RUNS
    device: int = 0
    arch: str | None = None
    dependent_launch: bool | None = None
    jitter: bool = False

    def __post_init__(self) -> None:
        if self.geometry.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"our kernels take heads of {' or '.join(map(str, HEAD_DIMS))} dimensions, this model has "
                f"{self.geometry.head_dim}: use --backend torch"
            )
        if self.geometry.page_bytes < TILE_BYTES:
            raise ValueError(
                f"pages of {self.geometry.page_bytes} bytes are smaller than a tile of {TILE_BYTES}: our kernels read "
                "tiles of at least 64 outputs, which high ranks would then not have; use --backend torch"
            )


def tile_capacity(geometry: Geometry, *, num_pages: int, max_adapters: int) -> int:
    """Return how many tiles the adapters that fit a pool can have.

    A matrix of at most a tile has one; larger ones are cut into tiles that are at least half full.
    """
    tile_bytes = min(TILE_BYTES, geometry.page_bytes)
    if max_adapters == 0:
        return 0
    # A of each op, and B of each projection.
    num_matrices = sum(len(layer) + len({each.op for each in layer}) for layer in geometry.layers)
    small = min(max_adapters, num_pages) * num_matrices
    return small + 2 * num_pages * (geometry.page_bytes // tile_bytes)
