"""Which refusals are right: the reasons allowed, and the faults that must have happened for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

# Reason -> words, one of which must be in the kind of a fault during the request.
_OF_GENERATION: Final[dict[str, tuple[str, ...]]] = {
    "UNAVAILABLE": ("gateway",),  # from gRPC and the socket: no process listens
    "STREAM_INTERRUPTED": ("gateway",),
    "DRAINING": ("restart gateway", "engine"),
    "NO_ENGINE": ("engine", "gateway"),
    "STORE_UNAVAILABLE": ("store", "valkey"),
    "SATURATED": ("large bodies",),
}
_OF_THE_CATALOGUE: Final[dict[str, tuple[str, ...]]] = {
    "UNAVAILABLE": ("store",),
    "STORE_UNAVAILABLE": ("store", "valkey"),
    "DRAINING": ("restart store",),
    "SATURATED": ("trickling uploads", "fill valkey"),
    "OPERATION_NOT_FOUND": ("store",),  # the replica that ran the import has died
    "CANCELLED": ("restart store",),
    "CONFLICT": ("valkey",),
}


def is_expected_of_generation(reason: str, disturbers: Iterable[str]) -> bool:
    """Return whether a generation may be refused so, given the kinds of faults during it."""
    return _is_expected(_OF_GENERATION, reason, disturbers)


def is_expected_of_the_catalogue(reason: str, disturbers: Iterable[str]) -> bool:
    """Return whether an import, a deletion or a move of a label may be refused so."""
    return _is_expected(_OF_THE_CATALOGUE, reason, disturbers)


def _is_expected(table: dict[str, tuple[str, ...]], reason: str, disturbers: Iterable[str]) -> bool:
    return any(word in kind for word in table.get(reason, ()) for kind in disturbers)
