"""Starts imports: a request names a source, or brings the files."""

from __future__ import annotations

import hashlib
import uuid
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterNotFoundError

from loraplex_adapter_store.imports.importer import Importer, Progress, Stage
from loraplex_adapter_store.imports.targets import ImportOutcome, ImportTarget
from loraplex_adapter_store.imports.uploads import AnnouncedFile, check_announced, receive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from google.longrunning import operations_pb2

    from loraplex_adapter_store.imports.budget import ImportBudget
    from loraplex_adapter_store.imports.hub import HubSource
    from loraplex_adapter_store.imports.long_running import LongRunning, Report
    from loraplex_adapter_store.imports.sources import Sources
    from loraplex_adapter_store.records import Answer
    from loraplex_adapter_store.repository.catalog import Catalog

_ID_CHARS: Final = 32


class Intake:
    """Starts imports from directories and the hub, and takes uploads in."""

    def __init__(
        self,
        importer: Importer,
        operations: LongRunning,
        catalog: Catalog,
        budget: ImportBudget,
        sources: Sources,
        *,
        max_adapter_bytes: int,
    ) -> None:
        self._importer = importer
        self._operations = operations
        self._catalog = catalog
        self._budget = budget
        self._sources = sources
        self._max_adapter_bytes = max_adapter_bytes

    @property
    def max_adapter_bytes(self) -> int:
        """Bytes of the largest adapter_model.safetensors."""
        return self._max_adapter_bytes

    async def start(
        self, source: str | HubSource, target: ImportTarget, *, credential: str
    ) -> operations_pb2.Operation:
        """Start an import from a ``file:`` URI or the hub; a repeated request_id returns the operation it started.

        Raises:
            InvalidParameterError: If the source is malformed or outside the import roots, or no adapter may have the
                name.
            AlreadyExistsError: If the request_id belongs to another call.
            SaturatedError: If too many imports wait.
        """
        self._catalog.check_name(target.name)
        identity, fetch = self._sources.fetcher(source, credential)
        if (answer := await self._catalog.answer_to(target.request_id)) is not None:
            target.asked.repeated(answer)
        self._budget.check_pending()
        fingerprint = f"{target.request_id}" if target.request_id else str(uuid.uuid4())
        operation_id = hashlib.sha256(fingerprint.encode()).hexdigest()[:_ID_CHARS]
        progress = Progress(target.name)

        async def work(report: Report) -> ImportOutcome:
            progress.on_change = partial(report, progress)
            outcome = await self._importer.import_from(identity, fetch, target, progress)
            progress.advance(Stage.DONE)
            return outcome

        return await self._operations.start(operation_id, progress, work, asked=target.asked)

    async def upload(
        self, files: tuple[AnnouncedFile, ...], parts: AsyncIterator[bytes], target: ImportTarget
    ) -> ImportOutcome:
        """Take an upload in; nothing is visible before all of it has arrived and been checked.

        Raises:
            LoraplexError: If anything is wrong with it.
        """
        if (earlier := await self.repeated(target)) is not None:
            return earlier
        self._catalog.check_name(target.name)
        num_bytes = check_announced(files, self._max_adapter_bytes)
        async with self._importer.counted(target), self._budget.arrival(num_bytes) as arrival:
            return await self._importer.import_files(await receive(files, parts, arrival.take), target)

    async def repeated(self, target: ImportTarget) -> ImportOutcome | None:
        """Return how an earlier request of this request_id ended; None if there was none.

        Raises:
            AlreadyExistsError: If the request_id belongs to another call.
            AdapterNotFoundError: If what it stored has been deleted since.
        """
        if (remembered := await self._catalog.answer_to(target.request_id)) is None:
            return None
        answer: Answer = target.asked.repeated(remembered)
        record = await self._catalog.get(answer.name)
        known = await self._catalog.get_revisions([answer.revision])
        if record is None or not known:
            raise AdapterNotFoundError(f"adapter {answer.name} has been deleted since this request was answered")
        return await self._importer.known(ImportOutcome(record, known[0], True, answer.warnings))
