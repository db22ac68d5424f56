"""Which engine takes a request: pure arithmetic over what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from collections.abc import Sequence

# A warm engine is preferred until it is this much busier than the idlest: loading an adapter costs about as much as a
# few decode steps, waiting behind half a batch costs more.
WARM_LOAD_FACTOR: Final = 1.5
WARM_LOAD_SLACK: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An engine that could take the request.

    Attributes:
        load: Requests running and waiting there, this gateway's latest submissions included.
        missing_bytes: Bytes of the request's adapters that it neither holds nor is getting for another request.
    """

    engine_id: str
    load: int
    missing_bytes: int = 0


def rendezvous(key: str, engine_id: str) -> int:
    """Return an engine's weight for a key; the engine with the highest one is the key's home.

    Removing an engine moves only the keys that lived there.

    Source: Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", CSE-TR-316-96.
    """
    return xxhash.xxh3_64_intdigest(f"{key}\x00{engine_id}".encode())


def choose(candidates: Sequence[Candidate], *, adapters: str, affinity_key: str) -> str | None:
    """Return the engine to take, or None if there is no candidate.

    In this order: the home of the affinity key; the least loaded of the engines that lack the fewest bytes of the adapters.
    Both are passed over if they are much busier than the least loaded one. Ties go to the adapters' home, so that a cold
    adapter is not loaded in several places.

    Args:
        candidates: The engines.
        adapters: What stands for the request's adapters; equal for requests of the same ones.
        affinity_key: What the request is routed by; empty for nothing.
    """
    if not candidates:
        return None
    limit = min(candidate.load for candidate in candidates) * WARM_LOAD_FACTOR + WARM_LOAD_SLACK

    def key(candidate: Candidate) -> tuple[int, int]:
        return candidate.load, -rendezvous(adapters, candidate.engine_id)

    if affinity_key:
        home = max(candidates, key=lambda candidate: rendezvous(affinity_key, candidate.engine_id))
        if home.load <= limit:
            return home.engine_id
    usable = [candidate for candidate in candidates if candidate.load <= limit]  # the least loaded one always is
    fewest = min(candidate.missing_bytes for candidate in usable)
    return min((candidate for candidate in usable if candidate.missing_bytes == fewest), key=key).engine_id
