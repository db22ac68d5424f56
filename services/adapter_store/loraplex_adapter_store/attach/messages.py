"""The messages between store and engine as domain types; the servicer converts them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from loraplex_common.adapter_image import Geometry
from loraplex_common.errors import LoraplexError


class Place(Enum):
    """The place of an engine's best copy of an image."""

    DEVICE = "device"
    ARENA = "arena"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaInfo:
    """An engine's host arena.

    Attributes:
        header_bytes: Bytes in front of slot 0; the first 32 hold the nonce.
    """

    num_slots: int
    num_free: int
    pid: int
    fd: int
    header_bytes: int
    nonce: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldImage:
    """An image that an engine has."""

    digest: str
    place: Place
    generation: int
    num_leases: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """An engine introduces itself.

    Attributes:
        arenas: One arena per tensor-parallel rank.
        max_image_pages: Pages of the largest image that the engine's pool can ever hold.
        max_rank: Largest rank of one projection that its kernels take; 0 if only the tiles limit it.
        weight_norms: Frobenius norms of the base's weights, for each decoder layer and projection in the order of the
            geometry's layers; empty if the engine does not say.
        max_added_tokens: Tokens that an adapter may add behind the base's vocabulary.
        takes_tree_digests: Whether it checks the tree digest that comes with `Filled`, and needs none with an offer.
        takes_written: Whether it takes `Written`, and hashes pages while others are on their way.
    """

    engine_id: str
    base_name: str
    base_fingerprint: str
    geometry: Geometry
    arenas: tuple[ArenaInfo, ...]
    held: tuple[HeldImage, ...]
    sequence: int
    max_image_pages: int
    max_rank: int = 0
    weight_norms: tuple[float, ...] = ()
    max_added_tokens: int = 0
    takes_tree_digests: bool = False
    takes_written: bool = False


@dataclass(frozen=True, slots=True)
class Want:
    """The engine needs an image.

    Attributes:
        time_left_s: How long the most urgent request that waits for it can wait; None if there is no limit.
        traceparent: W3C trace context of that request; empty without.
    """

    digest: str
    time_left_s: float | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """Arena slots for an offered image, one per page in page order."""

    digest: str
    rank: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Decline:
    """The engine has no room for an unsolicited image."""

    digest: str


@dataclass(frozen=True, slots=True)
class Residency:
    """An adapter's residency on the engine has changed.

    Attributes:
        failure: What was wrong with a transfer; None if nothing was.
    """

    sequence: int
    held: HeldImage
    failure: str | None


@dataclass(frozen=True, slots=True)
class Offer:
    """An image is ready, or can be made.

    Attributes:
        image_sha256: sha256 over the image's pages in order, for engines that take no tree digests; else empty.
        spec: JSON of `AdapterSpec`.
        is_expected: Whether a label is about to move to it.
    """

    digest: str
    rank: int
    num_pages: int
    image_sha256: str
    is_wanted: bool
    spec: bytes
    is_expected: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of an image; they never cross a page boundary."""

    digest: str
    rank: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """Pages of an image have been written into their slots, in shared memory.

    Attributes:
        pages: Their numbers in the image.
    """

    digest: str
    rank: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """The last byte of an image has been written.

    Attributes:
        tree_sha256: See `loraplex_common.tree_digest`.
    """

    digest: str
    rank: int
    tree_sha256: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """A want cannot be met."""

    digest: str
    error: LoraplexError


@dataclass(frozen=True, slots=True)
class Drop:
    """An image will not be wanted."""

    digest: str


@dataclass(frozen=True, slots=True)
class Ack:
    """What the store believes of an engine, so that lost events are found."""

    sequence: int
    num_held: int


FromEngine = Want | Grant | Decline | Residency
ToEngine = Offer | Chunk | Written | Filled | Refuse | Drop | Ack
