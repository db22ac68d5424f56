"""Brings a checkpoint into the catalog: fetch, check, store, and only then make it visible."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError, StoreUnavailableError
from loraplex_common.ids import DEFAULT_LABEL
from loraplex_common.image_geometry import OUTSIDE_NAMES
from loraplex_common.log import get_logger

from loraplex_adapter_store.imports.files import CheckpointFiles
from loraplex_adapter_store.imports.shared_work import SharedWork
from loraplex_adapter_store.records import AdapterRecord, Answer, Revision
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportTarget:
    """The name that an import is stored under, and what it is checked against.

    Attributes:
        label: Label to move in addition to ``latest``; may be empty.
        base_model: Base model to use instead of the checkpoint's own declaration; may be empty.
        content: Digest of all that the request asks for, without its request_id.
        is_staged: Whether ``latest`` stays where it is.
        expected: Where ``latest`` must point when the import is stored; empty means nowhere, None anywhere.
    """

    name: str
    label: str = ""
    base_model: str = ""
    request_id: str = ""
    content: str = ""
    is_staged: bool = False
    expected: str | None = None

    @property
    def asked(self) -> Answer:
        """What the request asks for; compared with what an earlier request of this id asked for."""
        return Answer("import", self.name, content=self.content)


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """A finished import."""

    record: AdapterRecord
    revision: Revision
    already_existed: bool
    warnings: tuple[str, ...] = ()


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
        return await self._measured(self._import_from(source, fetch, target, progress))

    async def import_files(self, files: CheckpointFiles, target: ImportTarget) -> ImportOutcome:
        """Import uploaded files; the caller holds room for them.

        Raises:
            LoraplexError: In the cases of `import_from`.
        """
        async with self._budget.place():
            return await self._measured(self._import_files(files, target, Progress(target.name)))

    async def _measured(self, work: Awaitable[ImportOutcome]) -> ImportOutcome:
        began = time.monotonic()
        try:
            outcome = await work
        except LoraplexError as error:
            self._metrics.imports.labels(error.reason.lower()).inc()
            raise
        self._metrics.imports.labels("ok").inc()
        self._metrics.import_seconds.observe(time.monotonic() - began)
        return outcome

    async def _import_from(self, source: str, fetch: Fetch, target: ImportTarget, progress: Progress) -> ImportOutcome:
        if (record := await self._catalog.get(target.name)) is not None:
            record.expect(DEFAULT_LABEL, target.expected)
        work = partial(self._checked, fetch, target.base_model, progress)
        async with self._shared.use((source, target.base_model), work, name=f"fetch {source}") as (form, origin):
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
                outcome = await self._store_reserved(form, source, target)
            except RevisionGoneError:
                continue  # collected between check and commit: write it again
            except BaseException:
                await self._abandon(form.revision)
                raise
            self._on_stored(form.revision, form.base_fingerprint)
            await self._told(outcome.record)
            return outcome
        raise StoreUnavailableError(f"revision {form.revision} keeps being deleted meanwhile", retry_after_s=5.0)

    async def _store_reserved(self, form: CanonicalForm, source: str, target: ImportTarget) -> ImportOutcome:
        known = await self._catalog.get_revisions([form.revision])
        exists = bool(known) and await self._blobs.is_complete(form.revision)
        revision = known[0] if known else _describe(form, target.name, source)
        now = time.time()

        def apply(old: AdapterRecord) -> AdapterRecord:
            old.expect(DEFAULT_LABEL, target.expected)
            return old.with_import(form.revision, target.label, now, is_staged=target.is_staged)

        if not exists:
            await self._catalog.check_room(target.name, apply, revision)
            await self._blobs.put(form)
        elif form.notes is not None:
            await self._blobs.note_if_missing(form.revision, form.notes)
        record = await self._catalog.change(
            target.name,
            apply,
            revision=None if exists else revision,
            request_id=target.request_id,
            answer=replace(target.asked, revision=form.revision, warnings=form.warnings),
        )
        _log.info("adapter imported", name=target.name, revision=form.revision, source=source, already_existed=exists)
        for warning in form.warnings:
            _log.warning("adapter imported, but", name=target.name, revision=form.revision, warning=warning)
        return ImportOutcome(record, revision, exists, form.warnings)

    async def _abandon(self, digest: str) -> None:
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
