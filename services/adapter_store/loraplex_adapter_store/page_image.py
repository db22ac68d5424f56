"""A page image, what it depends on, and whether an engine can take it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from loraplex_common import geometry_wire
from loraplex_common.adapter_image import AdapterSpec, Geometry
from loraplex_common.errors import AdapterIncompatibleError
from numpy.typing import NDArray

IMAGE: Final = "image:"
"""What the names of fields begin with that have the digests of images."""


@functools.lru_cache(maxsize=64)
def geometry_id(geometry: Geometry) -> str:
    """Return a short name of a geometry, equal in all processes."""
    data = geometry_wire.to_message(geometry).SerializeToString(deterministic=True)
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ImageKey:
    """The facts that an image depends on."""

    digest: str
    geometry: Geometry
    rank: int

    @property
    def field(self) -> str:
        """Name of the field that has its digest, in the hash of its revision's manifest."""
        return f"{IMAGE}{geometry_id(self.geometry)}:{self.rank}"


@dataclass(frozen=True, slots=True)
class Image:
    """An adapter as one tensor-parallel rank's kernels read it.

    Attributes:
        pages: ``[num_pages, page_bytes]``, uint8, read-only.
        tree_sha256: See `loraplex_common.tree_digest`.
    """

    spec: AdapterSpec
    base_fingerprint: str
    pages: NDArray[np.uint8]
    tree_sha256: str

    @property
    def plan(self) -> ImagePlan:
        """What is known of it before it exists."""
        return ImagePlan(self.spec, self.base_fingerprint, len(self.pages))


class ImagePlan(NamedTuple):
    """What is known of an image before it is derived: enough to offer it."""

    spec: AdapterSpec
    base_fingerprint: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class Fit:
    """What an engine can take.

    Attributes:
        max_pages: Pages of the largest image that its pool can ever hold.
    """

    base_fingerprint: str
    max_pages: int

    def check(self, key: ImageKey, plan: ImagePlan) -> None:
        """Raise `AdapterIncompatibleError` if an engine cannot take an image."""
        self.check_base(key.digest, plan.base_fingerprint)
        self.check_pages(key.digest, plan.num_pages, key.geometry.page_bytes, plan.spec.max_rank)

    def check_base(self, digest: str, base_fingerprint: str) -> None:
        """Raise `AdapterIncompatibleError` if an adapter is for another base model."""
        if base_fingerprint != self.base_fingerprint:
            raise AdapterIncompatibleError(
                f"revision {digest} is for base model {base_fingerprint}, the engine serves {self.base_fingerprint}"
            )

    def check_pages(self, digest: str, num_pages: int, page_bytes: int, max_rank: int) -> None:
        """Raise `AdapterIncompatibleError` if an image can never fit the pool."""
        if num_pages > self.max_pages:
            size, remedy = (
                (f" (largest rank {max_rank})", "lower the rank") if max_rank else ("", "adapt fewer modules")
            )
            raise AdapterIncompatibleError(
                f"revision {digest}{size} takes {num_pages} pages of {page_bytes} bytes = {num_pages * page_bytes} bytes, the "
                f"engine's pool can hold at most {self.max_pages} pages for one adapter; raise --pool-bytes or {remedy}"
            )
