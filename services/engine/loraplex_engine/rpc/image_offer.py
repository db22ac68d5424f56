"""An image that the store offers, and how far its transfer is."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_engine.rpc.image_check import ImageHash


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOffer:
    """An image that the store offers.

    Attributes:
        image_sha256: sha256 over the image's pages in order, 64 hex digits; empty if the tree digest comes with `filled`.
        is_wanted: False if no request asked for the adapter.
        is_expected: Whether a label is about to move to it, so that requests will ask for it.
        spec: JSON of `AdapterSpec`.
    """

    digest: str
    rank: int
    num_pages: int
    image_sha256: str
    is_wanted: bool
    spec: bytes
    is_expected: bool = False


class Stage(enum.Enum):
    """State of a transfer."""

    OFFERED = "offered"
    FILLING = "filling"
    VERIFYING = "verifying"


class Transfer:
    """The transfer of one adapter's images; it begins once all ranks' are offered.

    Args:
        offer: The first offer.
        num_ranks: Tensor-parallel ranks of the engine.

    Attributes:
        offers: The offer for each rank, as far as it has come.
        stage: How far it is.
        slots: Where each rank's part of the arena takes its image; empty before they are granted.
        hashes: For each rank, what hashes its image; empty before slots are granted.
        filled: For each rank, the tree digest once its image is complete.
        task: Carries the transfer out.
    """

    def __init__(self, offer: ImageOffer, num_ranks: int) -> None:
        self.offer = offer  # the first; those of other ranks say the same
        self.offers = {offer.rank: offer}
        self.stage = Stage.OFFERED
        self.slots: tuple[int, ...] = ()
        self.hashes: tuple[ImageHash, ...] = ()
        loop = asyncio.get_running_loop()
        self.filled: list[asyncio.Future[str]] = [loop.create_future() for _ in range(num_ranks)]
        self.task: asyncio.Task[None] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all ranks' images are offered."""
        return len(self.offers) == len(self.filled)
