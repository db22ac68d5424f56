"""A push from its first message to its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex_common.ids import DEFAULT_LABEL
from loraplex_common.log import get_logger

from loraplex_adapter_store.imports.targets import ImportOutcome
from loraplex_adapter_store.push.readiness import Readiness
from loraplex_adapter_store.push.tensor_stream import SOURCE, PushedAdapter, receive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from loraplex_adapter_store.imports.importer import Importer
    from loraplex_adapter_store.imports.intake import Intake
    from loraplex_adapter_store.imports.targets import ImportTarget, Written
    from loraplex_adapter_store.push.readiness import EngineReadiness
    from loraplex_adapter_store.push.tensor_stream import Part
    from loraplex_adapter_store.records import AdapterRecord
    from loraplex_adapter_store.repository.catalog import Catalog

_log = get_logger()
READY_TIMEOUT_S: Final = 10.0
MAX_READY_TIMEOUT_S: Final = 120.0
"""Far below the time for which a revision without a name is kept (`catalog.RESERVATION_S`)."""


@dataclass(frozen=True, slots=True)
class PushOutcome:
    """A finished push, and how far engines were when its labels moved."""

    imported: ImportOutcome
    engines: Readiness
    ready_timeout_s: float


class Pusher:
    """Takes pushes in.

    A push has four steps: its bytes arrive under the budget of imports; its weights are written, without a name; engines
    fetch them by their digest; one change of the catalog makes revision and labels known together. Until the last one
    nothing is to be seen of it, and what a broken push has written is collected.

    Args:
        intake: Knows the answers to earlier calls, and the largest adapter.
        importer: Checks, writes, and makes known.
        catalog: The names.
        readiness: Brings revisions to engines.
        forget: Tells engines of released revisions; never fails.
        num_kept: Pushed revisions without a label that a name keeps, the newest; at least 1.
    """

    def __init__(
        self,
        intake: Intake,
        importer: Importer,
        catalog: Catalog,
        readiness: EngineReadiness,
        *,
        forget: Callable[[Collection[str]], Awaitable[None]],
        num_kept: int,
    ) -> None:
        self._intake = intake
        self._importer = importer
        self._catalog = catalog
        self._readiness = readiness
        self._forget = forget
        self._num_kept = num_kept

    async def push(
        self, adapter: PushedAdapter, parts: AsyncIterator[Part], target: ImportTarget, ready_timeout_s: float
    ) -> PushOutcome:
        """Take a push in.

        Raises:
            ConflictError: If the label is not where it is expected, at the beginning or when the labels would move.
            LoraplexError: If anything else is wrong with it; nothing has changed then.
        """
        if (earlier := await self._intake.repeated(target)) is not None:
            return PushOutcome(earlier, Readiness(), ready_timeout_s)
        async with self._importer.counted(target):
            return await self._push(adapter, parts, target, ready_timeout_s)

    async def _push(
        self, adapter: PushedAdapter, parts: AsyncIterator[Part], target: ImportTarget, ready_timeout_s: float
    ) -> PushOutcome:
        written = await self._written(adapter, parts, target)
        try:
            left = await self._left(target, written)
            engines = await self._readiness.wait(left, written.revision.revision, ready_timeout_s if left else 0.0)
            pushed = await self._pushed(target.name) | {written.revision.revision}
            released: set[str] = set()

            def release(record: AdapterRecord) -> AdapterRecord:
                kept = [each for each in record.revisions if each in pushed and each not in record.labelled]
                released.clear()
                released.update(kept[self._num_kept :])
                return record.without(released)

            outcome = await self._importer.commit(written, replace(target, release=release))
        except BaseException:
            await self._importer.abandon(written.revision.revision)
            raise
        await self._forget(released)
        return PushOutcome(outcome, engines, ready_timeout_s)

    async def _written(self, adapter: PushedAdapter, parts: AsyncIterator[Part], target: ImportTarget) -> Written:
        self._catalog.check_name(target.name)
        if (record := await self._catalog.get(target.name)) is not None:
            record.expect(target.expected_label, target.expected)
        num_bytes = adapter.check(self._intake.max_adapter_bytes)
        async with self._importer.budget.arrival(num_bytes) as arrival:
            files = await receive(adapter, parts, arrival.take)
            return await self._importer.write_files(files, target)

    async def _left(self, target: ImportTarget, written: Written) -> frozenset[str]:
        """Return the revisions that labels leave, if engines can hold the new one in their place."""
        record = await self._catalog.get(target.name)
        if record is None or target.is_staged:
            return frozenset()
        left = {digest for label in {DEFAULT_LABEL, target.label} for digest in record.shares_of(label)}
        base = written.revision.base_fingerprint
        known = await self._catalog.get_revisions(sorted(left - {written.revision.revision}))
        return frozenset(revision.revision for revision in known if revision.base_fingerprint == base)

    async def _pushed(self, name: str) -> set[str]:
        """Return a name's revisions that came by a push; others are kept as any import's."""
        record = await self._catalog.get(name)
        known = await self._catalog.get_revisions(record.revisions) if record is not None else []
        return {revision.revision for revision in known if revision.source == SOURCE}
