"""Operations on a name: create, look up, change, delete, move a label."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import Principal
from loraplex_common.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AlreadyExistsError,
    ConflictError,
    InvalidParameterError,
)

from loraplex_adapter_store.answers import Answer
from loraplex_adapter_store.audit import audited
from loraplex_adapter_store.repository.catalog import Catalog, Change, RevisionGoneError, Told
from loraplex_adapter_store.visibility import Changed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.ids import AdapterRef

    from loraplex_adapter_store.records import AdapterRecord, Revision
    from loraplex_adapter_store.repository.moves import AliasMove, AliasMoves

MAX_DESCRIPTION: Final = 4096
MAX_TENANTS: Final = 1000
UPDATABLE: Final = ("description", "allowed_tenants")
MIN_LIST_BATCH: Final = 50
"""Names looked at in one step of a list, if most of them are deleted or hidden from the caller."""

Known = Callable[["AdapterRecord"], "Sequence[Revision] | None"]
"""Returns the revisions of a record where they are known without asking Valkey."""
Leases = Callable[[], Awaitable[dict[str, int]]]
"""Returns digest -> requests that lease it, on all engines."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a change.

    Attributes:
        request_id: Makes repeating a change harmless; may be empty.
        content: Digest of all that the request asks for, without its request_id.
    """

    tenant: Principal
    request_id: str = ""
    content: str = ""


class Lifecycle:
    """Operations on names; each is atomic, and acknowledged once gateways know of it."""

    def __init__(self, catalog: Catalog, moves: AliasMoves, leases: Leases, told: Told, known: Known) -> None:
        self._catalog = catalog
        self._moves = moves
        self._leases = leases
        self._told = told
        self._known = known

    async def create(self, name: str, description: str, allowed_tenants: tuple[str, ...], caller: Caller) -> Changed:
        """Reserve a name; a deleted one may be taken again.

        Raises:
            AlreadyExistsError: If the name is in use.
        """
        _check_fields(description, allowed_tenants)

        def apply(old: AdapterRecord) -> AdapterRecord:
            if old.version and not old.is_deleted:
                raise AlreadyExistsError(f"adapter {name} exists already")
            fields = {"description": description, "allowed_tenants": allowed_tenants, "is_deleted": False}
            return old.touched(time.time(), **fields)

        return await self._change("create", name, apply, caller)

    async def get(self, ref: AdapterRef, caller: Caller) -> tuple[AdapterRecord, Revision | None, Revision | None]:
        """Return a record, the revision that the reference means, and the latest revision.

        Raises:
            AdapterNotFoundError: If name, label or revision is unknown, deleted, or not visible to this tenant.
        """
        record = await self._visible(ref.name, caller)
        wanted, latest = record.resolve(ref), record.labels.get("latest")
        found = await self._revisions_of([record], [each for each in (wanted, latest) if each is not None])
        return record, found.get(wanted or ""), found.get(latest or "")

    async def page(
        self, *, page_size: int, after: str, prefix: str, show_deleted: bool, caller: Caller
    ) -> tuple[list[AdapterRecord], str]:
        """Return a page of records by name, and the name after which to go on; empty on the last page."""
        found: list[AdapterRecord] = []
        while len(found) <= page_size:
            # One more than is missing says whether there is a next page.
            count = max(MIN_LIST_BATCH, page_size + 1 - len(found))
            names = await self._catalog.list_names(after=after, prefix=prefix, count=count)
            if not names:
                break
            after = names[-1]
            tenant, is_admin = caller.tenant.name, caller.tenant.is_admin
            found += [
                record.as_shown_to(tenant, is_admin=is_admin)
                for record in await self._catalog.get_many(names)
                if (show_deleted or not record.is_deleted) and record.is_visible_to(tenant, is_admin=is_admin)
            ]
        page = found[:page_size]
        return page, page[-1].name if len(found) > page_size else ""

    async def latest_of(self, records: list[AdapterRecord]) -> dict[str, Revision]:
        """Return the latest revisions of many records: digest -> revision."""
        digests = [record.labels["latest"] for record in records if "latest" in record.labels]
        return await self._revisions_of(records, digests)

    async def revisions(self, name: str, *, page_size: int, offset: int, caller: Caller) -> tuple[list[Revision], bool]:
        """Return a page of a name's revisions, newest first, and whether there are more."""
        record = await self._visible(name, caller)
        digests = record.revisions[offset : offset + page_size]
        found = await self._revisions_of([record], digests)
        return [found[digest] for digest in digests if digest in found], offset + page_size < len(record.revisions)

    async def update(self, change: AdapterRecord, fields: tuple[str, ...], etag: str, caller: Caller) -> Changed:
        """Set the named fields from ``change``.

        Raises:
            InvalidParameterError: If a field cannot be set.
            ConflictError: If the etag is stale.
        """
        if not fields or any(field not in UPDATABLE for field in fields):
            raise InvalidParameterError(
                f"update_mask {','.join(fields)!r}: only {', '.join(UPDATABLE)} can be set", field="update_mask"
            )
        _check_fields(change.description, change.allowed_tenants)

        def apply(old: AdapterRecord) -> AdapterRecord:
            _check_etag(_existing(old), etag)
            return old.touched(time.time(), **{field: getattr(change, field) for field in fields})

        return await self._change("update", change.name, apply, caller)

    async def delete(self, name: str, etag: str, caller: Caller, *, force: bool) -> Changed:
        """Delete a name softly and return the tombstone; revisions without another reference are collected later.

        Raises:
            AdapterInUseError: If running requests lease one of its revisions, unless ``force``.
            ConflictError: If the etag is stale.
        """
        leases = {} if force else await self._leases()

        def apply(old: AdapterRecord) -> AdapterRecord:
            _check_etag(_existing(old), etag)
            used = {digest: leases[digest] for digest in old.revisions if leases.get(digest)}
            if used:
                raise AdapterInUseError(
                    f"adapter {name} is in use by {sum(used.values())} running requests; wait, or delete with force",
                    metadata=dict.fromkeys(used, "leased"),
                )
            return old.deleted(time.time())

        return await self._change("delete", name, apply, caller)

    async def set_alias(
        self, name: str, label: str, shares: Mapping[str, int], expected: str | None, caller: Caller
    ) -> Changed:
        """Move a label atomically.

        Args:
            name: The adapter.
            label: The label.
            shares: Revision -> weight; a single one is a plain label, none removes it.
            expected: Where it must point now; empty means nowhere, None anywhere.
            caller: The caller.

        Raises:
            ConflictError: If the label does not point at ``expected``.
            AdapterNotFoundError: If adapter, revision or (to remove) label do not exist.
        """

        def apply(old: AdapterRecord) -> AdapterRecord:
            _existing(old).expect(label, expected)
            return old.with_alias(label, shares, time.time())

        return await self._move("alias", name, apply, caller)

    async def roll_back(self, name: str, label: str, expected: str | None, caller: Caller) -> tuple[Changed, AliasMove]:
        """Point a label at what it left last; return the record, and the move that was taken back.

        Twice in a row leaves it where it was.

        Raises:
            ConflictError: If the label does not point at ``expected``, or moves meanwhile.
            AdapterNotFoundError: If adapter, label, or the revision that it left do not exist, or it has left none.
        """
        moves = await self._moves.of(name, label)
        if (answer := await self._catalog.answer_to(caller.request_id)) is None:
            taken_back, shares = _left_last(await self._visible(name, caller), label, moves)
        else:
            Answer("rollback", name, content=caller.content).repeated(answer)
            done = next((move for move in moves if move.cause == "rollback"), None)
            if done is None:
                raise AdapterNotFoundError(f"{name}:{label} has moved too often since this request was answered")
            taken_back, shares = done.reversed, {}

        def apply(old: AdapterRecord) -> AdapterRecord:
            _existing(old).expect(label, expected)
            old.expect(label, taken_back.revision)
            return old.with_alias(label, shares, time.time())

        return await self._move("rollback", name, apply, caller), taken_back

    async def moves(
        self, name: str, label: str, *, page_size: int, offset: int, caller: Caller
    ) -> tuple[list[AliasMove], bool]:
        """Return a page of the moves of a name's labels, newest first, and whether there are more."""
        await self._visible(name, caller)
        found = await self._moves.of(name, label)
        return found[offset : offset + page_size], offset + page_size < len(found)

    async def _revisions_of(self, records: Sequence[AdapterRecord], digests: Sequence[str]) -> dict[str, Revision]:
        """Return digest -> revision, of those that exist; only those that are not known are read."""
        wanted = set(digests)
        found = {
            revision.revision: revision
            for record in records
            for revision in self._known(record) or ()
            if revision.revision in wanted
        }
        missing = [digest for digest in dict.fromkeys(digests) if digest not in found]
        return found | {revision.revision: revision for revision in await self._catalog.get_revisions(missing)}

    async def _move(self, kind: str, name: str, apply: Change, caller: Caller) -> Changed:
        try:
            return await self._change(kind, name, apply, caller)
        except RevisionGoneError as error:
            raise AdapterNotFoundError(
                f"revision {error.args[0]} does not exist in this store", field="alias.revision"
            ) from None

    async def _visible(self, name: str, caller: Caller) -> AdapterRecord:
        record, tenant, is_admin = await self._catalog.get(name), caller.tenant.name, caller.tenant.is_admin
        if record is None or record.is_deleted or not record.is_visible_to(tenant, is_admin=is_admin):
            raise AdapterNotFoundError(f"adapter {name} does not exist")
        return record.as_shown_to(tenant, is_admin=is_admin)

    async def _change(self, kind: str, name: str, apply: Change, caller: Caller) -> Changed:
        with audited(kind, name) as facts:
            changed = await self._changed(kind, name, apply, caller)
            facts["labels"] = dict(changed.record.labels)
            return changed

    async def _changed(self, kind: str, name: str, apply: Change, caller: Caller) -> Changed:
        asked = Answer(kind, name, content=caller.content)
        if (answer := await self._catalog.answer_to(caller.request_id)) is not None:
            asked.repeated(answer)
            record = await self._catalog.get(name)
            if record is not None:
                return Changed(record, await self._told(record))
        record = await self._catalog.change(name, apply, request_id=caller.request_id, answer=asked)
        return Changed(record, await self._told(record))


def _left_last(record: AdapterRecord, label: str, moves: list[AliasMove]) -> tuple[AliasMove, dict[str, int]]:
    """Return a label's last move, and what the label was before it: revision -> weight."""
    now = record.shares_of(label)
    if not now:
        raise AdapterNotFoundError(f"adapter {record.name} has no label {label!r}")
    last = next((move for move in moves if move.revision == record.labels[label] and move.left), None)
    if last is None:
        raise AdapterNotFoundError(
            f"{record.name}:{label} has left no revision: point it at one of the revisions that the name has"
        )
    before = moves[moves.index(last) + 1 :]
    was_split = before and before[0].revision == last.left
    return last, (before[0].shares if was_split else {}) or {last.left: 1}


def _existing(record: AdapterRecord) -> AdapterRecord:
    if record.version == 0 or record.is_deleted:
        raise AdapterNotFoundError(f"adapter {record.name} does not exist")
    return record


def _check_etag(record: AdapterRecord, etag: str) -> None:
    if etag and etag != record.etag:
        raise ConflictError(f"adapter {record.name} has etag {record.etag}, not {etag}: read again")


def _check_fields(description: str, allowed_tenants: tuple[str, ...]) -> None:
    if len(description) > MAX_DESCRIPTION:
        raise InvalidParameterError(f"longer than {MAX_DESCRIPTION} characters", field="adapter.description")
    if len(allowed_tenants) > MAX_TENANTS or any(not name or len(name) > 256 for name in allowed_tenants):
        raise InvalidParameterError(
            f"at most {MAX_TENANTS} names of 1 to 256 characters", field="adapter.allowed_tenants"
        )
