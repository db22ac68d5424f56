"""Starts imports: a request names a source, or brings the files."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message
from loraplex_common.errors import AdapterNotFoundError, InvalidParameterError

from loraplex_adapter_store.imports.importer import Fetch, Importer, ImportOutcome, ImportTarget, Progress, Stage
from loraplex_adapter_store.imports.uploads import AnnouncedFile, check_announced, receive

if TYPE_CHECKING:
    from google.longrunning import operations_pb2

    from loraplex_adapter_store.credentials import Credentials
    from loraplex_adapter_store.imports.directory import ImportRoots
    from loraplex_adapter_store.imports.hub import Hub, HubSource
    from loraplex_adapter_store.imports.long_running import LongRunning
    from loraplex_adapter_store.records import Answer
    from loraplex_adapter_store.repository.catalog import Catalog

Describe = Callable[[Progress], Message]
Conclude = Callable[[ImportOutcome], Message]
_ID_CHARS: Final = 32


class Intake:
    """Starts imports.

    Args:
        describe: Turns progress into an operation's metadata.
        conclude: Turns an outcome into an operation's response.
    """

    def __init__(
        self,
        importer: Importer,
        operations: LongRunning,
        catalog: Catalog,
        roots: ImportRoots,
        hub: Hub,
        credentials: Credentials,
        *,
        max_adapter_bytes: int,
        describe: Describe,
        conclude: Conclude,
    ) -> None:
        self._importer = importer
        self._operations = operations
        self._catalog = catalog
        self._roots = roots
        self._hub = hub
        self._credentials = credentials
        self._max_adapter_bytes = max_adapter_bytes
        self._describe = describe
        self._conclude = conclude

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
        identity, fetch = self._fetcher(source, credential)
        if (answer := await self._catalog.answer_to(target.request_id)) is not None:
            target.asked.repeated(answer)
        self._importer.budget.check_pending()
        fingerprint = f"{target.request_id}" if target.request_id else str(uuid.uuid4())
        operation_id = hashlib.sha256(fingerprint.encode()).hexdigest()[:_ID_CHARS]
        progress = Progress(target.name)

        async def work(report: Callable[[Message], None]) -> Message:
            progress.on_change = lambda: report(self._describe(progress))
            outcome = await self._importer.import_from(identity, fetch, target, progress)
            progress.advance(Stage.DONE)
            return self._conclude(outcome)

        return await self._operations.start(operation_id, self._describe(progress), work, asked=target.asked)

    async def upload(
        self, files: tuple[AnnouncedFile, ...], parts: AsyncIterator[bytes], target: ImportTarget
    ) -> ImportOutcome:
        """Take an upload in; nothing is visible before all of it has arrived and been checked.

        Raises:
            LoraplexError: If anything is wrong with it.
        """
        if (answer := await self._catalog.answer_to(target.request_id)) is not None:
            return await self._repeated(target.asked.repeated(answer))
        self._catalog.check_name(target.name)
        num_bytes = check_announced(files, self._max_adapter_bytes)
        async with self._importer.budget.arrival(num_bytes) as arrival:
            return await self._importer.import_files(await receive(files, parts, arrival.take), target)

    def _fetcher(self, source: str | HubSource, credential: str) -> tuple[str, Fetch]:
        if isinstance(source, str):
            if credential:
                raise InvalidParameterError("a directory needs no credential", field="credential_ref")
            self._roots.locate(source)  # refuse a bad path at once
            return source, partial(self._roots.fetch, source, self._max_adapter_bytes)
        source.check()
        token = self._credentials.get(credential)
        # Work is not shared between credentials: one may see a source that another may not.
        return f"{source}#{credential}", partial(self._hub.fetch, source, token, self._max_adapter_bytes)

    async def _repeated(self, answer: Answer) -> ImportOutcome:
        record = await self._catalog.get(answer.name)
        known = await self._catalog.get_revisions([answer.revision])
        if record is None or not known:
            raise AdapterNotFoundError(f"adapter {answer.name} has been deleted since this request was answered")
        return ImportOutcome(record, known[0], already_existed=True, warnings=answer.warnings)
