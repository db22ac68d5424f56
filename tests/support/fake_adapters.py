"""Adapters, images and pages of a model that computes nothing, for `fake_runner`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, Geometry, ModuleSpec
from loraplex_engine.pool_geometry import PoolGeometry
from numpy.typing import NDArray
from support.decoder_shapes import decoder_geometry


def fake_pool(block_tokens: int, page_bytes: int) -> PoolGeometry:
    """Return the geometry of pages of so many tokens and bytes: one layer and head in bf16."""
    head_dim = page_bytes // (4 * block_tokens)  # keys and values, of two bytes each
    pool = PoolGeometry(dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=head_dim, block_tokens=block_tokens)
    assert pool.page_bytes == page_bytes, f"{page_bytes} bytes are no page of {block_tokens} tokens"
    return pool


def fake_geometry(page_bytes: int) -> Geometry:
    """Return the geometry of images in pages of so many bytes."""
    return decoder_geometry(
        dtype="float32",
        page_bytes=page_bytes,
        num_layers=1,
        hidden_size=4,
        intermediate_size=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
    )


def fake_spec(digest: str, rank: int = 8) -> AdapterSpec:
    """Return a spec of one module."""
    return AdapterSpec(digest, (ModuleSpec.low_rank(0, "q_proj", rank, 1.0),))


def fake_image(digest: str, num_pages: int, page_bytes: int) -> NDArray[np.uint8]:
    """Return ``[num_pages, page_bytes]`` that no other digest or page has."""
    rng = np.random.default_rng(zlib.crc32(digest.encode()))
    return rng.integers(0, 255, size=(num_pages, page_bytes), dtype=np.uint8)


@dataclass
class FakeAdapter:
    """An image in the pool; `is_done` once `finish_load` of the runner has copied it."""

    spec: AdapterSpec
    pages: NDArray[np.int32]
    source: NDArray[np.uint8]
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    is_loaded: bool = False

    def is_done(self) -> bool:
        return self.is_loaded

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)
        if self.is_loaded:
            callback()
