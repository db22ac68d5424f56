"""Names of the store's own keys in Valkey.

Catalog keys share one hash tag, so that scripts over several of them also run on a cluster. Chunks are spread by their
digest (``a:{sha}:...``).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraplex_common import valkey_errors
from loraplex_common.answer_by import given_up_in_time
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.tasks import deliver_cancellation

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX: Final = "loraplex:store:{names}:"
INDEX: Final = _PREFIX + "index"
"""Sorted set of all names ever stored, all scores 0: paged in the order of names."""
SEQUENCE: Final = _PREFIX + "sequence"
"""Counter of changes to the catalog; the position in WatchAliases."""
CHANGES: Final = _PREFIX + "changes"
"""Capped stream: entry ``{sequence}-0`` has the field ``name`` of the changed adapter."""
GARBAGE: Final = _PREFIX + "garbage"
"""Sorted set of revisions that may have no reference, scored by the time (unix ms) from which they may be collected."""
COUNTED: Final = _PREFIX + "counted"
"""String that exists once the bytes of all tenants have been counted, see `tenant_bytes`."""
COLD_TIER: Final = _PREFIX + "cold"
"""String: the folder of the object storage that has all blobs; missing where Valkey has them."""
HOT: Final = _PREFIX + "hot"
"""Sorted set of the blobs with copies in Valkey, of a store with a cold tier, by their last use (unix ms)."""
HOT_BYTES: Final = _PREFIX + "hot_bytes"
"""String: the bytes of all these copies."""
RESOLVED_USES: Final = _PREFIX + "resolved:uses"
"""Sorted set of the names of adapters that were resolved at request time, by their last use (unix ms)."""
RESOLVED_INFO: Final = _PREFIX + "resolved:info"
"""Hash of these names: name -> `ResolvedInfo` as JSON."""
RESOLVED_BYTES: Final = _PREFIX + "resolved:bytes"
"""String: the canonical bytes of all of them."""
REFUSED: Final = _PREFIX + "resolve:refused"
"""Hash of sources that could not be resolved: key of the source -> serialised google.rpc.Status."""
REFUSED_UNTIL: Final = _PREFIX + "resolve:refused:until"
"""Sorted set of the same keys, by the time (unix ms) until which the refusal is remembered."""
OPERATIONS: Final = "loraplex:store:{operations}:index"
"""Sorted set of operation ids by creation time."""


Client: TypeAlias = Any
"""`redis.asyncio.Redis` that answers in bytes; redis-py's own annotations say `bytes | str | ...` for every answer."""


def adapter(name: str) -> str:
    """Hash of an adapter: ``version`` and ``record`` (JSON)."""
    return f"{_PREFIX}adapter:{name}"


def moves(name: str) -> str:
    """List of the moves of a name's labels as JSON, newest first; kept when the name is deleted."""
    return f"{_PREFIX}moves:{name}"


def revision(digest: str) -> str:
    """String: the `Revision` as JSON. Exists only while the catalog may refer to it."""
    return f"{_PREFIX}revision:{digest}"


def text_parts(digest: str) -> str:
    """String: the `TextPartsInfo` of a revision as JSON; exists for revisions with text parts, as long as they do."""
    return f"{_PREFIX}texts:{digest}"


def references(digest: str) -> str:
    """Set of names that have this revision."""
    return f"{_PREFIX}references:{digest}"


def tenant_bytes(tenant: str) -> str:
    """Hash of a tenant's adapters: name -> canonical bytes, and their sum, see `tenant_bytes`."""
    return f"{_PREFIX}bytes:{tenant}"


def tenant_imports(tenant: str) -> str:
    """String: Unix milliseconds at which all of a tenant's imports are free again, see `tenant_imports`."""
    return f"{_PREFIX}imports:{tenant}"


def collecting(digest: str) -> str:
    """Lock held while a revision's blob is being deleted."""
    return f"{_PREFIX}collecting:{digest}"


def request(request_id: str) -> str:
    """String: the answer to a mutation with this request_id."""
    return f"{_PREFIX}request:{request_id}"


def manifest(digest: str) -> str:
    """Hash that makes a blob valid; written last."""
    return f"a:{{{digest}}}:m"


def chunk(digest: str, number: int) -> str:
    """One piece of a blob."""
    return f"a:{{{digest}}}:c:{number}"


def hot_chunks(digest: str) -> str:
    """Hash of the chunks of a blob with copies in Valkey: number -> bytes."""
    return f"{_PREFIX}hot:{digest}"


def held(engine_id: str) -> str:
    """Hash of what an attached engine holds: digest -> number of leases. Expires when its store stops renewing it."""
    return f"loraplex:store:held:{engine_id}"


def resolve_pin(source: str) -> str:
    """String: what a source without a commit was pinned to last; expires."""
    return f"{_PREFIX}resolve:pin:{source}"


def resolve_digest(source: str) -> str:
    """String: the revision that a pinned source is; expires."""
    return f"{_PREFIX}resolve:digest:{source}"


def resolve_lease(source: str) -> str:
    """String: the import that fetches a source; expires unless it is renewed."""
    return f"{_PREFIX}resolve:lease:{source}"


def operation(operation_id: str) -> str:
    """String: a serialised google.longrunning.Operation."""
    return f"loraplex:store:{{operations}}:{operation_id}"


def operation_use(operation_id: str) -> str:
    """String: what an operation was asked to do, as `Answer` JSON; outlives an operation whose replica died."""
    return f"loraplex:store:{{operations}}:{operation_id}:use"


def cancelled(operation_id: str) -> str:
    """String that asks the replica which runs an operation to cancel it."""
    return f"loraplex:store:{{operations}}:{operation_id}:cancel"


@contextmanager
def translated() -> Iterator[None]:
    """Turn Valkey's failures inside the block into errors of the contract, see `valkey_errors`.

    It also delivers cancellation: Python 3.11's `asyncio.wait_for`, which redis-py sends through, swallows a
    cancellation that comes in the same moment as its result (fixed in 3.12), and a loop over Valkey would then never
    end.

    Raises:
        StoreUnavailableError: If Valkey cannot be reached or refuses, or does not answer before the call that runs here
            must be answered; RetryInfo says one second.
        SaturatedError: If Valkey is full.
    """
    try:
        with valkey_errors.translated(), given_up_in_time(_silent):
            yield
    finally:
        deliver_cancellation()


def _silent() -> StoreUnavailableError:
    return StoreUnavailableError(
        "the adapter store's Valkey has not answered in time; the change may or may not be made: repeat the call with the "
        "same request_id",
        retry_after_s=1.0,
    )
