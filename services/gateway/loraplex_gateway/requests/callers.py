"""What a caller's credential decides about its requests: their class, and which cached prefixes they may find."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from loraplex_common.errors import PriorityForbiddenError

from loraplex_gateway.types import Priority

if TYPE_CHECKING:
    from loraplex_common.auth import Principal


def granted_priority(wanted: Priority | None, caller: Principal) -> Priority:
    """Return the class that a request gets.

    Args:
        wanted: What it asks for; None for the caller's usual one: normal, or less if its credential allows no more.
        caller: The principal that asks.

    Raises:
        PriorityForbiddenError: If its credential does not allow the class.
    """
    highest = Priority(caller.highest_priority)
    if wanted is None:
        return min(Priority.NORMAL, highest)
    if wanted > highest:
        name, most = wanted.name.lower(), highest.name.lower()
        raise PriorityForbiddenError(
            f"priority {name} is above what {caller.name!r} may ask for: ask for {most} or leave it out; "
            f"priority={name} in its line of the gateway's keys file (--api-keys-file) allows it",
            metadata={"priority": name, "highest_priority": most},
        )
    return wanted


def cache_salt(caller: Principal, salt: str) -> str:
    """Return the salt that engines get for a request's own: requests of two sharing groups never have the same."""
    return _within_group(caller, "cache_salt", salt)


def affinity_key(caller: Principal, key: str) -> str:
    """Return the key that a request is routed by for its own; empty for none.

    That two tenants chose the same key must not show, as it would in their requests' going to one engine.
    """
    return _within_group(caller, "affinity_key", key) if key else ""


def _within_group(caller: Principal, kind: str, text: str) -> str:
    """Return a digest that is different for every sharing group, kind and text."""
    digest = hashlib.sha256()
    for part in (caller.sharing_group.encode(), kind.encode(), text.encode()):
        digest.update(len(part).to_bytes(8, "little"))  # no part can pass for the end of another
        digest.update(part)
    return digest.hexdigest()
