"""Names, labels and revisions in Valkey: read freely, changed by compare-and-swap of one name's record.

Every change is one script: record, references, sequence, change stream and the answer to the request_id change together
or not at all. A change is acknowledged after Valkey has written it to disk (WAITAOF).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import ConflictError, StoreUnavailableError
from loraplex_common.log import get_logger

from loraplex_adapter_store.records import AdapterRecord, AdapterView, Position, Revision
from loraplex_adapter_store.repository import keys, scripts
from loraplex_adapter_store.repository.commit_words import commit_words
from loraplex_adapter_store.repository.on_disk import OnDisk
from loraplex_adapter_store.repository.tenant_bytes import TOTAL, LimitOf, TenantShares, unlimited
from loraplex_adapter_store.repository.tenant_imports import TenantImports
from loraplex_adapter_store.visibility import Visibility

if TYPE_CHECKING:
    from loraplex_adapter_store.answers import Answer

_log = get_logger()
MAX_ATTEMPTS: Final = 20
RESERVATION_S: Final = 600.0
MAX_COUNTED_AT_ONCE: Final = 500

Change = Callable[[AdapterRecord], AdapterRecord]
"""Maps a record (version 0 if the name is new) to the record after the change; raises if it refuses the change."""

Told = Callable[[AdapterRecord], Awaitable[Visibility]]
"""Waits until gateways know of a record's state after a change, and returns which do."""


class RevisionGoneError(Exception):
    """A revision that existed has been collected meanwhile; write it again. Args: the digest."""


class Catalog:
    """The store's metadata.

    Args:
        gc_grace_s: How long a revision without references is kept, for requests that were resolved just before.
        check_name: Refuses names that no adapter may have here, by any kind of change; an adapter with one can be
            deleted.
        limit_of: Gives the bytes of adapters that a tenant may have.
        on_disk: Waits until a change is on disk; by default on Valkey's own.
        imports: Counts tenants' imports; by default none is limited.

    Attributes:
        imports: As given.
    """

    def __init__(
        self,
        client: keys.Client,
        *,
        gc_grace_s: float,
        check_name: Callable[[str], None],
        limit_of: LimitOf = unlimited,
        on_disk: OnDisk | None = None,
        imports: TenantImports | None = None,
    ) -> None:
        self._client = client
        self._gc_grace_s = gc_grace_s
        self.check_name = check_name
        self._limit_of = limit_of
        self._on_disk = on_disk or OnDisk()
        self.imports = imports or TenantImports(client, unlimited)

    async def get(self, name: str) -> AdapterRecord | None:
        """Return a record, deleted ones included; None if the name was never stored."""
        with keys.translated():
            data = await self._client.hget(keys.adapter(name), "record")
        return AdapterRecord.from_json(data) if data else None

    async def get_many(self, names: Sequence[str]) -> list[AdapterRecord]:
        """Return the records of the names that exist, in order."""
        if not names:
            return []
        with keys.translated():
            found = await self._client.eval(scripts.READ, len(names), *(keys.adapter(name) for name in names))
        return [AdapterRecord.from_json(data) for data in found if data]

    async def list_names(self, *, after: str, prefix: str, count: int) -> list[str]:
        """Return up to ``count`` names greater than ``after`` that begin with ``prefix``, in order."""
        low = f"({after}" if after and after >= prefix else f"[{prefix}"
        with keys.translated():
            found = await self._client.zrangebylex(keys.INDEX, low if low != "[" else "-", f"[{prefix}\xff", 0, count)
        return [name.decode() for name in found]

    async def get_revisions(self, digests: Sequence[str]) -> list[Revision]:
        """Return the revisions that exist, in order."""
        if not digests:
            return []
        names = [key(digest) for key in (keys.revision, keys.text_parts) for digest in digests]
        with keys.translated():
            found = await self._client.mget(names)
        each = zip(digests, found[: len(digests)], found[len(digests) :], strict=True)
        return [Revision.from_json(data, text_parts, digest=digest) for digest, data, text_parts in each if data]

    async def view(self, record: AdapterRecord) -> AdapterView:
        """Return a record together with its revisions."""
        return AdapterView(record, tuple(await self.get_revisions(record.revisions)))

    async def position(self) -> Position:
        """Return the catalog's present position."""
        with keys.translated():
            sequence, run, line = await self._client.eval(scripts.POSITION, 1, keys.SEQUENCE)
        return Position(f"{run.decode()}-{line.decode()}", int(sequence))

    async def answer_to(self, request_id: str) -> bytes | None:
        """Return the answer of the mutation with this request_id; None if there was none."""
        if not request_id:
            return None
        with keys.translated():
            answer: bytes | None = await self._client.get(keys.request(request_id))
        return answer

    async def reserve(self, digest: str) -> None:
        """Make sure that a revision about to be written is not collected before it is referred to."""
        due = round((time.time() + RESERVATION_S) * 1000)
        names = [keys.collecting(digest), keys.GARBAGE, keys.references(digest)]
        with keys.translated():
            for _ in range(200):
                if await self._client.eval(scripts.RESERVE, len(names), *names, digest, str(due)):
                    return
                await asyncio.sleep(0.05)  # the old blob is being deleted right now
        raise StoreUnavailableError(f"revision {digest} is still being deleted", retry_after_s=5.0)

    async def abandon(self, digest: str) -> None:
        """Let a reserved revision be collected at once, unless something refers to it."""
        with keys.translated():
            await self._client.eval(scripts.POSTPONE, 1, keys.GARBAGE, digest, round(time.time() * 1000))

    async def change(
        self, name: str, apply: Change, *, answer: Answer, revision: Revision | None = None, request_id: str = ""
    ) -> AdapterRecord:
        """Apply a change to one name's record, however many others try the same; return the record after it.

        Args:
            name: The adapter.
            apply: The change; called anew after each lost race.
            answer: What the call asks for, and what to remember of it under ``request_id``.
            revision: A revision whose blob has just been written; all others must exist already.
            request_id: Makes repeating the call harmless; may be empty.

        Raises:
            InvalidParameterError: If no adapter may have the name.
            RevisionGoneError: If a revision that the new record refers to does not exist.
            ConflictError: If other changes always come first.
            AlreadyExistsError: If another call has taken the request_id meanwhile.
            TenantQuotaError: If a tenant may not have so many bytes of adapters; nothing has changed then.
            StoreUnavailableError: If Valkey cannot be reached, or does not confirm that it wrote the change to disk.
        """
        for attempt in range(MAX_ATTEMPTS):
            old = await self.get(name) or AdapterRecord(name=name)
            new = apply(old)
            if not new.is_deleted:
                self.check_name(name)
            shares = await self._shares(old, new, revision)
            status, detail = await self._commit(old, new, revision, request_id, answer, shares)
            if status == b"ok":
                return new
            if status == b"duplicate":  # the same call ran twice at once, and the other one was faster
                answer.repeated(detail)
                return await self.get(name) or new
            if status == b"quota":
                raise shares.refusal(name, *(int(word) for word in detail.split()))
            if status == b"missing":
                raise RevisionGoneError(detail.decode())
            await asyncio.sleep(0.002 * attempt)
        raise ConflictError(f"adapter {name} is being changed by many at once: try again", retry_after_s=1.0)

    async def check_room(self, name: str, apply: Change, revision: Revision) -> None:
        """Refuse an import that `change` would refuse for its bytes, as far as is known before its blob is written.

        Raises:
            TenantQuotaError: If a tenant may not have so many bytes.
        """
        old = await self.get(name) or AdapterRecord(name=name)
        shares = await self._shares(old, apply(old), revision)
        for number, limit in enumerate(shares.limits):
            if limit is None:
                continue
            with keys.translated():
                total, own = await self._client.hmget(shares.keys[number], TOTAL, name)
            before = int(own or 0)
            others = int(total or 0) - before
            if before < shares.num_bytes[number] and others + shares.num_bytes[number] > limit:
                raise shares.refusal(name, number, others, before)

    async def sizes_of(self, tenant: str) -> dict[str, int]:
        """Return a tenant's adapters, and the bytes that each counts."""
        with keys.translated():
            found = await self._client.hgetall(keys.tenant_bytes(tenant))
        return {name.decode(): int(size) for name, size in found.items() if name.decode() != TOTAL}

    async def _shares(self, old: AdapterRecord, new: AdapterRecord, revision: Revision | None) -> TenantShares:
        if not (old.allowed_tenants or new.allowed_tenants):
            return TenantShares((), (), ())
        revisions = await self.get_revisions(new.revisions)
        shares = TenantShares.of(old, new, [*revisions, *([revision] if revision else [])], self._limit_of)
        if any(limit is not None for limit in shares.limits):
            await self._count_what_is_not_counted()
        return shares

    async def _count_what_is_not_counted(self) -> None:
        """Count adapters that were written before bytes were counted with every change; once in a catalog's life."""
        with keys.translated():
            if await self._client.exists(keys.COUNTED):
                return
        after = ""
        while names := await self.list_names(after=after, prefix="", count=MAX_COUNTED_AT_ONCE):
            after = names[-1]
            for record in await self.get_many(names):
                if record.allowed_tenants and record.revisions:
                    await self._count(record)
        with keys.translated():
            await self._client.set(keys.COUNTED, "1")
        _log.info("the bytes of tenants' adapters were counted")

    async def _count(self, record: AdapterRecord) -> None:
        """Count one adapter, unless it has changed meanwhile: that change counted it."""
        revisions = await self.get_revisions(record.revisions)
        shares = TenantShares.of(AdapterRecord(name=record.name), record, revisions, unlimited)
        names = [keys.adapter(record.name), *shares.keys]
        with keys.translated():
            await self._client.eval(scripts.COUNT, len(names), *names, record.version, record.name, shares.num_bytes[0])

    async def _commit(
        self,
        old: AdapterRecord,
        new: AdapterRecord,
        revision: Revision | None,
        request_id: str,
        answer: Answer,
        shares: TenantShares,
    ) -> tuple[bytes, bytes]:
        due = round((time.time() + self._gc_grace_s) * 1000)
        names, values = commit_words(old, new, revision, request_id, answer, due)
        names += shares.keys
        values += shares.words
        with keys.translated():
            async with self._client.client() as connection:  # WAITAOF is about this connection's writes
                if revision is not None and revision.text_parts is not None:
                    # Before the commit: a record of the revision without it would mean that there are none.
                    await connection.set(keys.text_parts(revision.revision), revision.text_parts.to_json())
                script = scripts.REMOVE if new.is_deleted else scripts.COMMIT
                status, detail = await connection.eval(script, len(names), *names, *values)
                if status == b"ok":
                    await self._on_disk.wait(connection)
        return status, detail
