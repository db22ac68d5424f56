"""The table of names as gateways follow it: first the whole table, then every change, in order.

Each replica keeps the table in memory and follows the catalog's change stream in Valkey. So all replicas tell their
watchers the same, whichever replica made the change.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import DrainingError, LoraplexError, SequenceGapError, StoreUnavailableError
from loraplex_common.exposition import private
from loraplex_common.housekeeping import keep_doing
from loraplex_common.log import get_logger
from loraplex_common.wake_up import WakeUp

from loraplex_adapter_store.alias_update import AliasUpdate, in_chunks, in_parts
from loraplex_adapter_store.records import AdapterRecord, AdapterView, Position, Revision
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.visibility import Visibility
from loraplex_adapter_store.whole_table import WholeTable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Iterable, Iterator

    from loraplex_common.auth import Principal

    from loraplex_adapter_store.repository.catalog import Catalog
    from loraplex_adapter_store.watchers import Watchers

_log = get_logger()
NAMES_AT_ONCE: Final = 250
"""Names that are read at once: decoding them, or their revisions, takes two milliseconds, in which no call is answered."""
QUEUE_LENGTH: Final = 256
HISTORY: Final = 4096
BLOCK_MS: Final = 1000
MAX_PAUSE_S: Final = 2.0
FIRST_LOAD_S: Final = 5.0
FOLLOW_S: Final = 5.0


class AliasTable:
    """This replica's table and the streams of its watchers.

    Args:
        base_fingerprints: Fingerprints of the base models known here; adapters of others are reported at the first
            read.
        watchers: What gateways have taken in; kept as an attribute.
    """

    def __init__(
        self, client: keys.Client, catalog: Catalog, base_fingerprints: Collection[str], watchers: Watchers
    ) -> None:
        self._client = client
        self._catalog = catalog
        self._base_fingerprints = base_fingerprints
        self.watchers = watchers
        self._views: dict[str, AdapterView] = {}
        self._position = Position("", 0)
        self._is_current = False
        self._history: deque[tuple[int, str]] = deque(maxlen=HISTORY)  # (sequence, name), oldest first
        self._watchers: set[asyncio.Queue[AliasUpdate | LoraplexError]] = set()
        self._loaded = asyncio.Event()
        self._changed = WakeUp()
        self._names: dict[str, str] = {}  # digest -> a name it has

    @property
    def is_loaded(self) -> bool:
        """Whether the table has been read at least once."""
        return self._loaded.is_set()

    def name_of(self, digest: str) -> str:
        """Return a name of a revision, for people to read; the digest itself if it has none."""
        return self._names.get(digest, digest)

    def label_of(self, digest: str) -> str:
        """Return `name_of` as a label of metrics; `private` if the adapter is limited to some tenants."""
        name = self.name_of(digest)
        view = self._views.get(name)
        return private(name) if view is not None and view.record.allowed_tenants else name

    def revisions(self, tenant: Principal) -> list[str]:
        """Return the digests of all revisions that a tenant may see."""
        records = (view.record for view in self._views.values())
        visible = (record for record in records if record.is_visible_to(tenant.name, is_admin=tenant.is_admin))
        return [digest for record in visible for digest in record.revisions]

    def revisions_of(self, record: AdapterRecord) -> tuple[Revision, ...] | None:
        """Return a record's revisions if the table has the name in the same version; None means that they must be read."""
        view = self._views.get(record.name)
        return view.revisions if view is not None and view.record.version == record.version else None

    def end_watches(self) -> None:
        """End all watches; the watchers connect to another replica."""
        for queue in self._watchers:
            queue.put_nowait(DrainingError("this store is shutting down: watch another"))

    async def wait_for(self, record: AdapterRecord) -> Visibility:
        """Wait until gateways serve a change, so that its author can use the name at once, and return which do.

        Those of this replica that acknowledge nothing have been told of it then, those of all replicas that do have taken it
        in. The change is safe in any case: what is not done within `FOLLOW_S` seconds is logged and returned, not raised.
        """
        loop = asyncio.get_running_loop()
        give_up_at, visibility = loop.time() + FOLLOW_S, Visibility(timeout_s=FOLLOW_S)
        try:
            async with asyncio.timeout_at(give_up_at):
                # Versions of another history cannot be compared: a store that went back counts them anew.
                position = await self._catalog.position()  # not before the change
                await self._changed.wait_until(lambda: self._knows(record, position.history_id))
            visibility = await self.watchers.wait(position, give_up_at - loop.time())
        except (TimeoutError, LoraplexError):
            _log.warning("a change is acknowledged before gateways know of it", name=record.name)
        if visibility.late:
            _log.warning(
                "a change is acknowledged before all gateways know of it", name=record.name, late=visibility.late
            )
        return replace(visibility, timeout_s=FOLLOW_S)

    async def run(self) -> None:
        """Follow the catalog for ever. After each failure of Valkey, read the table anew and compare."""
        await keep_doing(self._turn, name="following the name table", max_pause_s=MAX_PAUSE_S)

    async def watch(self, start_sequence: int, start_history_id: str = "") -> AsyncGenerator[AliasUpdate, None]:
        """Yield the table (``start_sequence`` 0) or the changes since, then every change as it happens.

        Args:
            start_sequence: The watcher's position.
            start_history_id: The history that the position belongs to; empty if the watcher does not know.

        Raises:
            SequenceGapError: If the position is too old or unknown, or the watcher falls too far behind.
            StoreUnavailableError: If the table has never been read because Valkey cannot be reached.
        """
        if not self.is_loaded:
            try:
                async with asyncio.timeout(FIRST_LOAD_S):
                    await self._loaded.wait()
            except TimeoutError:
                raise StoreUnavailableError("the name table has not been read yet", retry_after_s=1.0) from None
        queue: asyncio.Queue[AliasUpdate | LoraplexError] = asyncio.Queue()  # bounded by _publish
        # There is no await between reading the table and joining the watchers, so no change is missed or sent twice.
        first = self._snapshot() if start_sequence == 0 else self._since(start_sequence, start_history_id)
        self._watchers.add(queue)
        try:
            for update in first:
                yield update
            while not isinstance(item := await queue.get(), LoraplexError):
                yield item
            raise item
        finally:
            self._watchers.discard(queue)

    def _snapshot(self) -> Iterator[AliasUpdate]:
        return in_chunks(self._position, [self._views[name] for name in sorted(self._views)])

    def _since(self, start_sequence: int, start_history_id: str) -> list[AliasUpdate]:
        newest = self._position.sequence
        oldest = self._history[0][0] if self._history else newest + 1
        if start_history_id not in ("", self._position.history_id):
            raise SequenceGapError(
                f"sequence {start_sequence} is of another history, {start_history_id}: start again from sequence 0"
            )
        if start_sequence > newest or start_sequence < oldest - 1:
            raise SequenceGapError(
                f"sequence {start_sequence} is not within {oldest - 1} to {newest}: start again from sequence 0"
            )
        changed = dict.fromkeys(name for sequence, name in self._history if sequence > start_sequence)
        before = replace(self._position, sequence=start_sequence)
        return in_parts(before, self._position, [self._views[name] for name in changed])

    def _knows(self, record: AdapterRecord, history_id: str) -> bool:
        view = self._views.get(record.name)
        is_same = self._position.history_id == history_id
        return is_same and view is not None and view.record.version >= record.version

    async def _turn(self) -> None:
        is_current, self._is_current = self._is_current, False  # it stays False if the read below fails
        if not is_current:
            await self._reload()
        await self._follow()
        position = await self._catalog.position()
        # The connection may lead to another server than a moment ago without any failure.
        is_same = position.history_id == self._position.history_id
        self._is_current = is_same and position.sequence >= self._position.sequence

    async def _reload(self) -> None:
        """Read everything; send watchers the differences, or the whole table if it may be an earlier state."""
        position = await self._catalog.position()
        found, after = WholeTable(self._views, self._base_fingerprints), ""
        while names := await self._catalog.list_names(after=after, prefix="", count=NAMES_AT_ONCE):
            found.add(await self._with_revisions(await self._catalog.get_many(names)))
            after = names[-1]
        if not self.is_loaded:
            found.report_strangers()
        old, went_back = self._position, self._went_back(position, found.lost())
        self._views, self._names, self._position = found.views, found.names, position
        updates: Iterable[AliasUpdate]
        if went_back or position.history_id != old.history_id or not self.is_loaded:
            self._history.clear()
            updates = self._snapshot() if self._watchers else ()
        else:
            self._history.extend((position.sequence, view.record.name) for view in found.changed)
            # Even if nothing is new: changes wait until the position is acknowledged.
            updates = in_parts(old, position, found.changed) or [AliasUpdate(position, ())]
        self._loaded.set()
        self._publish(updates)

    def _went_back(self, position: Position, lost: list[str]) -> bool:
        """Return whether the stored state is earlier than the one sent to watchers, and log what is lost."""
        went_back = bool(lost) or position.sequence < self._position.sequence
        if went_back:
            _log.error(
                "Valkey went back to an earlier state: changes that were acknowledged are gone; what it has now is served",
                from_sequence=self._position.sequence,
                to_sequence=position.sequence,
                num_names=len(lost),
                names=sorted(lost)[:10],
            )
        return went_back

    async def _follow(self) -> None:
        with keys.translated():
            found = await self._client.xread({keys.CHANGES: f"{self._position.sequence}-0"}, count=100, block=BLOCK_MS)
        for _, entries in found or ():
            changes = [(int(entry_id.partition(b"-")[0]), fields[b"name"].decode()) for entry_id, fields in entries]
            if changes[0][0] != self._position.sequence + 1:  # the stream is capped: what was not read in time is gone
                await self._reload()
                return
            names = list(dict.fromkeys(name for _, name in changes))
            views = await self._with_revisions(await self._catalog.get_many(names))
            for view in views:
                self._views[view.record.name] = view
                self._names.update(dict.fromkeys(view.record.revisions, view.record.name))
            self._history.extend(changes)
            before, self._position = self._position, replace(self._position, sequence=changes[-1][0])
            self._publish(in_parts(before, self._position, views))

    async def _with_revisions(self, records: list[AdapterRecord]) -> list[AdapterView]:
        digests = list(dict.fromkeys(digest for record in records for digest in record.revisions))
        known: dict[str, Revision] = {}
        for start in range(0, len(digests), 500):
            found = await self._catalog.get_revisions(digests[start : start + 500])
            known |= {revision.revision: revision for revision in found}
        return [AdapterView(r, tuple(known[d] for d in r.revisions if d in known)) for r in records]

    def _publish(self, updates: Iterable[AliasUpdate]) -> None:
        for update in updates:
            for queue in list(self._watchers):
                if queue.qsize() < QUEUE_LENGTH:
                    queue.put_nowait(update)
                else:
                    queue.put_nowait(
                        SequenceGapError("the watcher fell behind by too many changes: start again from sequence 0")
                    )
                    self._watchers.discard(queue)
        self._changed.notify()
