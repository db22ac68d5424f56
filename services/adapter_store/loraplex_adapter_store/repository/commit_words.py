"""What the script that commits a change of the catalog is given, see `scripts.COMMIT`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.moves import MOVES_KEPT, moves_between

if TYPE_CHECKING:
    from loraplex_adapter_store.answers import Answer
    from loraplex_adapter_store.records import AdapterRecord, Revision

CHANGES_KEPT: Final = 10_000
REQUEST_TTL_S: Final = 24 * 3600


def commit_words(
    old: AdapterRecord, new: AdapterRecord, revision: Revision | None, request_id: str, answer: Answer, due_ms: int
) -> tuple[list[str], list[Any]]:
    """Return the keys and the values, but for those of tenants.

    Args:
        old: The record as it was read.
        new: The record after the change.
        revision: A revision whose blob has just been written.
        request_id: May be empty.
        answer: What is remembered under it.
        due_ms: When a revision that loses its last reference may be collected, Unix milliseconds.
    """
    added = [digest for digest in new.revisions if digest not in old.revisions]
    if revision is not None and revision.revision not in added:
        added.append(revision.revision)  # restores a record that was lost
    removed = [digest for digest in old.revisions if digest not in new.revisions]
    names = [
        keys.adapter(new.name),
        keys.INDEX,
        keys.SEQUENCE,
        keys.CHANGES,
        keys.GARBAGE,
        keys.request(request_id),
        keys.moves(new.name),
    ]
    names += [key for digest in added for key in (keys.revision(digest), keys.references(digest))]
    names += [keys.references(digest) for digest in removed]
    values: list[Any] = [old.version, new.version, new.to_json(), new.name, due_ms, CHANGES_KEPT]
    values += [
        answer.to_json() if request_id else "",
        REQUEST_TTL_S * 1000,
        len(added),
        len(removed),
        *added,
        *removed,
    ]
    moves = [move.to_json() for move in moves_between(old, new, answer.kind)]
    values += [revision.to_json() if revision else "", json.dumps(moves) if moves else "", MOVES_KEPT]
    return names, values
