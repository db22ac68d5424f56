"""Follows the adapter store's table of names, and reconnects after every loss of connection."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import grpc
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from loraplex_common.alias_acks import Acknowledgements
from loraplex_common.log import get_logger
from loraplex_common.reconnect import keep_connected
from loraplex_common.tasks import cancel_and_wait

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from loraplex_common.auth import Principal
    from loraplex_common.peers import PeerChannel

FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 5.0
SLICE_NAMES: Final = 256
"""Names of a whole table that are taken in at one step: some milliseconds."""
NO_SPLITS: Final[Mapping[str, tuple[tuple[str, int], ...]]] = MappingProxyType({})
"""One for all adapters without a split label, which are nearly all."""
NO_COUNTERPARTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
"""As `NO_SPLITS`, of adapters that serve on one base model."""
NO_TEXT_PARTS: Final[Mapping[str, str]] = MappingProxyType({})
"""One for all adapters of which no revision brings text parts."""
Item = TypeVar("Item")

_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterEntry:
    """The present state of one adapter name.

    Attributes:
        labels: Label to digest; for a split label, the digest with the largest share.
        splits: Label to its shares (digest and weight, in the order of digests), of labels that are split.
        base_fingerprints: Digest of each known revision to the fingerprint of its base model.
        counterparts: Digest of each revision that serves on further base models to its digests for these.
        text_parts: Digest of each revision that brings text parts to the digest of these.
        created: Digest of each known revision to the Unix time at which the store imported it.
        num_bytes: Digest of each known revision to the bytes of its canonical form.
        allowed_tenants: Tenants that may use it; empty means all tenants.
        is_deleted: True once the name is no longer served.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=lambda: NO_SPLITS)
    base_fingerprints: Mapping[str, str] = field(default_factory=dict)
    counterparts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NO_COUNTERPARTS)
    text_parts: Mapping[str, str] = field(default_factory=lambda: NO_TEXT_PARTS)
    created: Mapping[str, int] = field(default_factory=dict)
    num_bytes: Mapping[str, int] = field(default_factory=dict)
    allowed_tenants: frozenset[str] = frozenset()
    is_deleted: bool = False

    def on_a_base(self, digest: str, fingerprints: Container[str]) -> str | None:
        """Return the digest that serves a revision on one of some base models: its own first; None if there is none."""
        candidates = (digest, *self.counterparts.get(digest, ()))
        return next((each for each in candidates if self.base_fingerprints.get(each, "") in fingerprints), None)

    def allows(self, caller: Principal) -> bool:
        """Whether a caller may use the adapter, and know of it."""
        return not self.allowed_tenants or caller.name in self.allowed_tenants or caller.uses_all_adapters


class AliasTable(Protocol):
    """A table that is kept equal to the store's."""

    def replacing(self, entries: Iterable[AdapterEntry]) -> Iterator[None]:
        """Forget everything and take over a whole table, in steps of `SLICE_NAMES`: other tasks run between two of them."""

    def update(self, entries: Iterable[AdapterEntry]) -> None:
        """Take over the present state of several names."""


class AliasFeed:
    """Follows `AdapterStoreService.WatchAliases`.

    Every connection starts with the whole table: it is small, and no lost event can outlive a reconnect.

    Args:
        channel: Channel to the adapter store.
        tables: The tables to keep up to date; they stay unchanged while the store is away.
        watcher_id: A name unique among all watchers, of one for which changes wait: the store is told what has been taken
            in. Empty for one that need not know at once.
    """

    def __init__(self, channel: PeerChannel, tables: Sequence[AliasTable], *, watcher_id: str = "") -> None:
        self._channel = channel
        self._tables = tables
        self._watcher_id = watcher_id
        self._acknowledgements = Acknowledgements(watcher_id)
        self._is_away = False
        self._has_heard = False
        self._history_id, self._sequence = "", 0

    async def run(self) -> None:
        """Follow the store for ever."""
        await keep_connected(self._follow_once, first_pause_s=FIRST_BACKOFF_S, max_pause_s=MAX_BACKOFF_S)

    async def _follow_once(self) -> bool:
        """Follow over one connection to its end; return whether the store said anything."""
        self._has_heard = False
        try:
            await self._follow()
        except grpc.aio.AioRpcError as error:
            say = _log.debug if self._is_away else _log.warning
            say("lost the adapter store; names stay as last known", cause=error.details())
            self._is_away = True
        return self._has_heard

    async def _follow(self) -> None:
        async with self._channel.use() as channel:
            stub: adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub
            stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            request = adapter_store_pb2.WatchAliasesRequest(
                start_sequence=0, uses_text_parts=True, watcher_id=self._watcher_id
            )
            call = stub.WatchAliases(request, wait_for_ready=True)
            self._acknowledgements = Acknowledgements(self._watcher_id)
            acknowledging = asyncio.create_task(self._acknowledgements.run(stub), name="alias-feed-acknowledgements")
            try:
                await self._take_in(call)
            finally:
                call.cancel()
                await cancel_and_wait(acknowledging)

    async def _take_in(self, call: grpc.aio.UnaryStreamCall[Any, adapter_store_pb2.WatchAliasesResponse]) -> None:
        staged: list[AdapterEntry] | None = None
        response: Any = await self._first_word(call)
        while response is not None and response is not grpc.aio.EOF:
            self._has_heard, self._is_away = True, False
            entries = [entry_of(entry) for entry in response.entries]
            if response.snapshot_start:
                staged = []
                self._compare(response)
            if staged is None:
                for table in self._tables:
                    table.update(entries)
            else:
                staged += entries
                if response.snapshot_end:
                    num_adapters = len(staged)
                    for table in self._tables:
                        for _ in table.replacing(staged):
                            await asyncio.sleep(0)
                    while staged:  # those that are as they were are given back
                        del staged[-SLICE_NAMES:]
                        await asyncio.sleep(0)
                    _log.info("received the name table", num_adapters=num_adapters, sequence=response.sequence)
                    staged = None
            self._history_id, self._sequence = response.history_id, response.sequence
            if staged is None:
                self._acknowledgements.took_in(self._history_id, self._sequence)
            response = await call.read()

    async def _first_word(self, call: grpc.aio.UnaryStreamCall[Any, Any]) -> Any:
        """Return the first message; None if new credentials come first, as a refused connection never sends one."""
        reading = asyncio.create_task(call.read(), name="alias-feed-first-word")
        outdated = asyncio.create_task(self._channel.outdated(), name="alias-feed-credentials")
        try:
            await asyncio.wait({reading, outdated}, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            await cancel_and_wait(*(task for task in (reading, outdated) if not task.done()))

    def _compare(self, response: adapter_store_pb2.WatchAliasesResponse) -> None:
        """Log a warning if the new state is older than the known one; in one history only replicas lag, by moments."""
        if response.history_id != self._history_id and response.sequence < self._sequence:
            _log.warning(
                "the adapter store went back to an earlier state; the names it has now are served",
                from_sequence=self._sequence,
                to_sequence=response.sequence,
            )


def in_slices(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    """Yield the items in parts of `SLICE_NAMES`."""
    iterator = iter(items)
    while part := tuple(itertools.islice(iterator, SLICE_NAMES)):
        yield part


def entry_of(entry: adapter_store_pb2.WatchAliasesResponse.Entry) -> AdapterEntry:
    """Return an entry of a message; each list of it is walked through once, as each step makes an object."""
    # Each field of a message is a text anew. A table of a hundred thousand names keeps each text once.
    digests: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    created: dict[str, int] = {}
    num_bytes: dict[str, int] = {}
    text_parts: dict[str, str] = {}
    for revision in entry.revisions:
        digest = revision.revision
        digests[digest] = digest
        fingerprints[digest] = sys.intern(revision.base_fingerprint)
        created[digest] = revision.create_time.seconds
        num_bytes[digest] = revision.canonical_bytes
        if revision.HasField("text_parts"):
            text_parts[digest] = revision.text_parts.digest
    labels: dict[str, str] = {}
    splits: dict[str, tuple[tuple[str, int], ...]] = {}
    for alias in entry.aliases:
        label, digest = sys.intern(alias.label), alias.revision
        labels[label] = digests.get(digest, digest)
        if shares := alias.shares:
            splits[label] = tuple(sorted((share.revision, share.weight) for share in shares))
    return AdapterEntry(
        name=entry.name,
        labels=labels,
        splits=splits or NO_SPLITS,
        base_fingerprints=fingerprints,
        counterparts=_counterparts(entry) if entry.counterparts else NO_COUNTERPARTS,
        text_parts=text_parts or NO_TEXT_PARTS,
        created=created,
        num_bytes=num_bytes,
        allowed_tenants=frozenset(map(sys.intern, entry.allowed_tenants)),
        is_deleted=entry.deleted,
    )


def _counterparts(entry: adapter_store_pb2.WatchAliasesResponse.Entry) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for each in entry.counterparts:
        found[each.revision] = (*found.get(each.revision, ()), each.counterpart)
    return found
