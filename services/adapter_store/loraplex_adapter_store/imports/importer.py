"""Brings a checkpoint into the catalog: fetch, check, store, and only then make it visible."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError, StoreUnavailableError, TenantQuotaError
from loraplex_common.image_geometry import OUTSIDE_NAMES
from loraplex_common.log import get_logger

from loraplex_adapter_store.audit import audited
from loraplex_adapter_store.imports.files import CheckpointFiles
from loraplex_adapter_store.imports.shared_work import SharedWork
from loraplex_adapter_store.imports.targets import ImportOutcome, ImportTarget, Written
from loraplex_adapter_store.records import Revision
from loraplex_adapter_store.repository.catalog import Catalog, RevisionGoneError, Told

if TYPE_CHECKING:
    from loraplex_adapter_store.checkpoint.canonical import CanonicalForm
    from loraplex_adapter_store.imports.budget import ImportBudget
    from loraplex_adapter_store.imports.checker import CheckpointChecker
    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.repository.blobs import Blobs

_log = get_logger()
MAX_ATTEMPTS = 5


class Stage(Enum):
    """State of an import."""

    PENDING = 1
    FETCHING = 2
    VALIDATING = 3
    STORING = 4
    DONE = 5


@dataclass(slots=True)
class Progress:
    """Progress of a running import; changed in place, with a call of `on_change` after each change."""

    name: str
    stage: Stage = Stage.PENDING
    bytes_done: int = 0
    bytes_total: int = 0
    on_change: Callable[[], None] = lambda: None

    def advance(self, stage: Stage, *, bytes_done: int | None = None, bytes_total: int | None = None) -> None:
        """Move to a stage."""
        self.stage = stage
        self.bytes_done = self.bytes_done if bytes_done is None else bytes_done
        self.bytes_total = self.bytes_total if bytes_total is None else bytes_total
        self.on_change()


Fetch = Callable[[Callable[[int], None]], Awaitable[CheckpointFiles]]
"""Reads a checkpoint in a thread; its argument waits, in that thread, for memory for that many more bytes."""


class Importer:
    """Runs imports, bounded in number and memory; concurrent imports of one source are fetched and checked once.

    Args:
        told: An import ends once it has waited for this.
        on_stored: Called with the digest of each revision that was stored, and its base's fingerprint.
    """

    def __init__(
        self,
        checker: CheckpointChecker,
        catalog: Catalog,
        blobs: Blobs,
        budget: ImportBudget,
        metrics: StoreMetrics,
        *,
        told: Told,
        on_stored: Callable[[str, str], None] = lambda digest, base_fingerprint: None,
    ) -> None:
        self._checker = checker
        self._catalog = catalog
        self._blobs = blobs
        self._budget = budget
        self._metrics = metrics
        self._told = told
        self._on_stored = on_stored
        self._shared: SharedWork[tuple[CanonicalForm, str]] = SharedWork()

    @property
    def budget(self) -> ImportBudget:
        """The bounds of all imports."""
        return self._budget

    async def import_from(self, source: str, fetch: Fetch, target: ImportTarget, progress: Progress) -> ImportOutcome:
        """Import from a directory or the hub.

        Args:
            source: Identity of the source: concurrent imports with equal identities share the work.
            fetch: Reads the source.
            target: The name to store it under.
            progress: Updated during the import.

        Raises:
            ConflictError: If ``latest`` is not where it is expected; nothing is fetched if it is not before.
            LoraplexError: If anything is wrong with source, checkpoint or Valkey; nothing has changed then.
        """
        # What follows the mark in an identity is the credential's name.
        with audited(target.kind, target.name, source=source.partition("#")[0], **target.facts) as facts:
            outcome = await self._measured(self._import_from(source, fetch, target, progress))
            facts |= outcome.facts(target)
            return outcome

    @asynccontextmanager
    async def counted(self, target: ImportTarget) -> AsyncIterator[None]:
        """Count an import for the tenants of its name; the block's failure gives it back.

        Raises:
            TenantQuotaError: If one of them has no import left.
        """
        tenants = target.tenants_of(await self._catalog.get(target.name))
        async with self._catalog.imports.one(target.name, tenants):
            yield

    async def import_files(self, files: CheckpointFiles, target: ImportTarget) -> ImportOutcome:
        """Import uploaded files; the caller holds room for them, inside of `counted`.

        Raises:
            LoraplexError: In the cases of `import_from`.
        """
        with audited("import", target.name, source=files.source) as facts:
            async with self._budget.place():
                outcome = await self._measured(self._import_files(files, target, Progress(target.name)))
            facts |= outcome.facts(target)
            return outcome

    async def write_files(self, files: CheckpointFiles, target: ImportTarget) -> Written:
        """Check files and write them without a name; the caller holds room, then calls `commit` or `abandon`, all `counted`.

        Raises:
            LoraplexError: In the cases of `import_from`; nothing is left behind then.
        """
        async with self._budget.place():
            with self._counted():
                began = time.monotonic()
                form = await self._checker.check(files, target.base_model)
                await self._catalog.reserve(form.revision)
                try:
                    written = await self._write(form, files.source, target)
                except BaseException:
                    await self.abandon(form.revision)
                    raise
                return replace(written, seconds=time.monotonic() - began)

    async def commit(self, written: Written, target: ImportTarget) -> ImportOutcome:
        """Make written weights known under their name, once gateways have been told.

        Raises:
            ConflictError: If the label is not where it is expected.
            StoreUnavailableError: If the weights have been deleted meanwhile.
        """
        with audited(target.kind, target.name, source=written.revision.source, **target.facts) as facts:
            outcome = await self._commit_written(written, target)
            facts |= outcome.facts(target)
            return outcome

    async def _commit_written(self, written: Written, target: ImportTarget) -> ImportOutcome:
        digest = written.revision.revision
        await self._catalog.reserve(digest)
        try:
            if not await self._blobs.is_complete(digest):
                raise RevisionGoneError(digest)
            outcome = await self._measured(self._commit(written, target), spent_s=written.seconds)
        except RevisionGoneError:
            raise StoreUnavailableError(
                f"revision {digest} was deleted while engines fetched it: push again", retry_after_s=1.0
            ) from None
        return await self.known(outcome)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count an import that fails in the block."""
        try:
            yield
        except LoraplexError as error:
            self._metrics.imports.labels(error.reason.lower()).inc()
            raise

    async def _measured(self, work: Awaitable[ImportOutcome], *, spent_s: float = 0.0) -> ImportOutcome:
        began = time.monotonic() - spent_s
        with self._counted():
            outcome = await work
        self._metrics.imports.labels("ok").inc()
        self._metrics.import_seconds.observe(time.monotonic() - began)
        return outcome

    async def _import_from(self, source: str, fetch: Fetch, target: ImportTarget, progress: Progress) -> ImportOutcome:
        if (record := await self._catalog.get(target.name)) is not None:
            record.expect(target.expected_label, target.expected)
        work, key = partial(self._checked, fetch, target.base_model, progress), (source, target.base_model)
        async with self.counted(target), self._shared.use(key, work, name=f"fetch {source}") as (form, origin):
            return await self._store(form, origin, target, progress)

    @asynccontextmanager
    async def _checked(
        self, fetch: Fetch, base_model: str, progress: Progress
    ) -> AsyncIterator[tuple[CanonicalForm, str]]:
        """Fetch and check a source; hold its room, and a place from the check on."""
        async with self._budget.arrival() as arrival:
            async with self._budget.fetching():
                progress.advance(Stage.FETCHING)
                files = await fetch(arrival.taker())
            async with self._budget.place():
                num_bytes = len(files.weights)
                progress.advance(Stage.VALIDATING, bytes_done=num_bytes, bytes_total=num_bytes)
                yield await self._checker.check(files, base_model), files.source

    async def _import_files(self, files: CheckpointFiles, target: ImportTarget, progress: Progress) -> ImportOutcome:
        form = await self._checker.check(files, target.base_model)
        return await self._store(form, files.source, target, progress)

    async def _store(self, form: CanonicalForm, source: str, target: ImportTarget, progress: Progress) -> ImportOutcome:
        progress.advance(Stage.STORING)
        for _ in range(MAX_ATTEMPTS):
            await self._catalog.reserve(form.revision)
            try:
                outcome = await self._commit(await self._write(form, source, target), target)
            except RevisionGoneError:
                continue  # collected between check and commit: write it again
            except TenantQuotaError as error:
                await self.abandon(form.revision)
                if target.make_room is None or not await target.make_room(form.num_bytes, error):
                    raise
                continue
            except BaseException:
                await self.abandon(form.revision)
                raise
            self._on_stored(form.revision, form.base_fingerprint)
            return await self.known(outcome)
        raise StoreUnavailableError(f"revision {form.revision} keeps being deleted meanwhile", retry_after_s=5.0)

    async def _write(self, form: CanonicalForm, source: str, target: ImportTarget) -> Written:
        known = await self._catalog.get_revisions([form.revision])
        exists = bool(known) and await self._blobs.is_complete(form.revision)
        revision = known[0] if known else _describe(form, target.name, source)
        if not exists:
            apply = partial(target.applied, revision=form.revision, now=time.time())
            await self._catalog.check_room(target.name, apply, revision)
            await self._blobs.put(form)
        elif form.notes is not None:
            await self._blobs.note_again(form.revision, form.notes)
        return Written(revision, exists, form.warnings, signer="" if form.notes is None else form.notes.signer)

    async def _commit(self, written: Written, target: ImportTarget) -> ImportOutcome:
        revision, digest, exists = written.revision, written.revision.revision, written.already_existed
        record = await self._catalog.change(
            target.name,
            partial(target.applied, revision=digest, now=time.time()),
            revision=None if exists else revision,
            request_id=target.request_id,
            answer=replace(target.asked, revision=digest, warnings=written.warnings),
        )
        _log.info("adapter imported", name=target.name, revision=digest, source=revision.source, already_existed=exists)
        for warning in written.warnings:
            _log.warning("adapter imported, but", name=target.name, revision=digest, warning=warning)
        return ImportOutcome(record, revision, exists, written.warnings, signer=written.signer)

    async def known(self, outcome: ImportOutcome) -> ImportOutcome:
        """Return a finished import once gateways know of it, or the time for that is over."""
        return replace(outcome, visibility=await self._told(outcome.record))

    async def abandon(self, digest: str) -> None:
        """Delete what a failed import has left; if Valkey is away, the reservation expires by itself."""
        try:
            await asyncio.shield(self._catalog.abandon(digest))
        except LoraplexError as error:
            _log.warning("what a failed import wrote is collected later", revision=digest, error=error.message)


def _describe(form: CanonicalForm, name: str, source: str) -> Revision:
    return Revision(
        revision=form.revision,
        name=name,
        base_fingerprint=form.base_fingerprint,
        max_rank=form.spec.max_rank,
        num_parameters=form.num_parameters,
        canonical_bytes=form.num_bytes,
        target_modules=tuple(sorted({module.projection for module in form.spec.modules})),
        num_layers=len({each.layer for each in form.spec.modules if each.projection not in OUTSIDE_NAMES}),
        source=source,
        create_time=time.time(),
        text_parts=form.text_parts.info,
    )
