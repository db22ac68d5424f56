"""From the name a client writes to the digest an engine knows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraplex_common.alias_feed import in_slices
from loraplex_common.errors import AdapterNotFoundError, StoreUnavailableError
from loraplex_common.ids import MAX_CANDIDATES, AdapterRef, find_revision
from loraplex_common.wake_up import WakeUp

from loraplex_gateway.adapters.close_names import NameOrder
from loraplex_gateway.adapters.name_blocks import NameBlocks
from loraplex_gateway.adapters.split_labels import share_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from loraplex_common.alias_feed import AdapterEntry
    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.name_blocks import NameBlock


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedAdapter:
    """One revision, ready to be named to an engine.

    Attributes:
        is_restricted: True if only some tenants may use it.
        text_parts: Digest of what the revision brings besides weights; empty for nothing.
        num_bytes: Bytes of its canonical form; 0 if they are not known.
        source: Pinned source, if the request names it by its source.
        counterparts: The same adapter for other base models, by an operator's word.
    """

    name: str
    digest: str
    base_fingerprint: str
    is_restricted: bool = False
    text_parts: str = ""
    num_bytes: int = 0
    source: str = ""
    counterparts: tuple[ResolvedAdapter, ...] = ()

    def on(self, fingerprint: str) -> ResolvedAdapter | None:
        """Return the adapter as it serves on a base model; None if it does not."""
        return next((each for each in (self, *self.counterparts) if each.base_fingerprint == fingerprint), None)


@dataclass(frozen=True, slots=True)
class Readers:
    """The callers that may use one adapter of several.

    Attributes:
        has_public: Whether there is an adapter that every caller may use.
        tenants: Tenants that restricted adapters are for.
    """

    has_public: bool
    tenants: frozenset[str]

    def include(self, caller: Principal) -> bool:
        """Whether a caller is one of them."""
        return self.has_public or caller.name in self.tenants or caller.uses_all_adapters


class NameTable:
    """Every adapter name, as the adapter store last told it. Its state outlives the connection to the store."""

    def __init__(self) -> None:
        self._entries: dict[str, AdapterEntry] = {}
        self._order = NameOrder()
        self._blocks = NameBlocks()
        self._is_synced = False
        self._changed = WakeUp()

    @property
    def is_synced(self) -> bool:
        """True once a whole table has been received."""
        return self._is_synced

    async def wait_until_synced(self) -> None:
        """Wait for the first whole table."""
        await self._changed.wait_until(lambda: self._is_synced)

    def replace_all(self, entries: Iterable[AdapterEntry]) -> None:
        """Forget everything and take a whole table, at once."""
        for _ in self.replacing(entries):
            pass

    def replacing(self, entries: Iterable[AdapterEntry]) -> Iterator[None]:
        """Take a whole table, some hundred names at each step; names that are as they were cost a comparison.

        Until the end each name is as it was before or as it is in the new table.
        """
        wanted: dict[str, AdapterEntry] = {}
        for part in in_slices(entries):
            wanted.update((entry.name, entry) for entry in part if not entry.is_deleted)
            yield
        for names in in_slices(tuple(self._entries)):
            self._forget(name for name in names if name not in wanted)
            yield
        if self._entries:
            for part in in_slices(wanted.values()):
                self.update(entry for entry in part if self._entries.get(entry.name) != entry)
                yield
        else:
            yield from self._taking_first(wanted)
        self._is_synced = True
        self._changed.notify()

    def _taking_first(self, wanted: dict[str, AdapterEntry]) -> Iterator[None]:
        """Take a table where there was none: what keeps names in order is made of all of them, not name by name."""
        order = NameOrder()
        for _ in order.adding(wanted):
            yield
        self._entries, self._order, self._blocks = wanted, order, NameBlocks(order)
        yield

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._entries.pop(name, None)
            self._order.discard(name)
            self._blocks.discard(name)

    def update(self, entries: Iterable[AdapterEntry]) -> None:
        """Take new truth about some names."""
        for entry in entries:
            if entry.is_deleted:
                self._forget((entry.name,))
            else:
                self._entries[entry.name] = entry
                self._order.add(entry.name)
                self._blocks.changed(entry.name)
        self._changed.notify()

    def visible_to(self, caller: Principal, *, after: str = "") -> Iterator[AdapterEntry]:
        """Yield the adapters with a revision that a caller may use, by name, those behind a name if one is given.

        Blocks of adapters none of which the caller may use are passed over as a whole.
        """
        for block in self._blocks.blocks(after):
            if not self.readers(block).include(caller):
                continue
            for name in block.names:
                if name > after and (entry := self._entries.get(name)) is not None and _is_listed(entry, caller):
                    yield entry

    def blocks(self, at: str = "") -> list[NameBlock]:
        """Return the names in blocks, beginning with the one that has a name, or would have it."""
        return self._blocks.blocks(at)

    def entries_of(self, block: NameBlock) -> list[AdapterEntry]:
        """Return what is known of the names of a block."""
        return [entry for name in block.names if (entry := self._entries.get(name)) is not None]

    def readers(self, block: NameBlock) -> Readers:
        """Return the callers that may use an adapter of a block."""
        readers = block.memo.get(Readers)
        if readers is None:
            allowed = [entry.allowed_tenants for entry in self.entries_of(block)]
            readers = Readers(not all(allowed), frozenset().union(*allowed))
            block.memo[Readers] = readers
        return readers

    @property
    def changed(self) -> asyncio.Event:
        """The event that the next change sets; take it before looking at the table."""
        return self._changed.next

    async def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Return once a condition on the table holds; it is checked now and after each change."""
        await self._changed.wait_until(is_true)

    def entry(self, name: str, caller: Principal) -> AdapterEntry | None:
        """Return what is known of a name; None if there is none that the caller may use."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.allows(caller) else None

    async def resolve(self, text: str, *, caller: Principal, patience_s: float) -> ResolvedAdapter:
        """Return the revision that a reference points at now, see `resolve_all`."""
        return (await self.resolve_all({"adapter": text}, caller=caller, patience_s=patience_s))[0]

    async def resolve_all(
        self, texts: Mapping[str, str], *, caller: Principal, patience_s: float, sticky_key: str = ""
    ) -> tuple[ResolvedAdapter, ...]:
        """Return the revisions that references point at, all of them at one moment.

        A caller that may not use an adapter is answered, and waits, as if it were not there: names of others are no news.

        Args:
            texts: ``name``, ``name:label`` or ``name@revision`` by the field of the request; of a revision the first 8
                digits do.
            caller: The principal that asks.
            patience_s: How long an unknown name may take to appear: an import that its caller has just seen
                acknowledged may still be on its way here.
            sticky_key: What a split label's revision is chosen by; empty means the revision with the largest share.

        Raises:
            InvalidParameterError: If the reference is malformed, or several revisions begin as it says.
            AdapterNotFoundError: If there is no such name, label or revision for the caller; the message has close matches.
            StoreUnavailableError: If no table has been received yet, so that nothing can be said.
        """
        refs = {field: AdapterRef.parse(text, field=field) for field, text in texts.items()}
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + patience_s
        while True:
            found = {field: self._find(ref, caller, field, sticky_key) for field, ref in refs.items()}
            resolved = tuple(adapter for adapter in found.values() if adapter is not None)
            if len(resolved) == len(refs):
                return resolved
            changed = self._changed.next
            try:
                async with asyncio.timeout_at(give_up_at):
                    await changed.wait()
            except TimeoutError:
                missing = next(refs[field] for field, adapter in found.items() if adapter is None)
                raise self._not_found(missing, caller) from None

    def _find(self, ref: AdapterRef, caller: Principal, field: str, sticky_key: str) -> ResolvedAdapter | None:
        entry = self.entry(ref.name, caller)
        if entry is None:
            return None
        if ref.revision is not None:
            digest = find_revision(ref.revision, entry.base_fingerprints, field=field)
        else:
            digest = entry.labels.get(ref.label or "")
            if sticky_key and (shares := entry.splits.get(ref.label or "")) is not None:
                digest = share_of(shares, label=f"{ref.name}:{ref.label}", sticky_key=sticky_key)
        if digest is None or digest not in entry.base_fingerprints:
            return None
        others = (other for other in entry.counterparts.get(digest, ()) if other in entry.base_fingerprints)
        return replace(_resolved(entry, digest), counterparts=tuple(_resolved(entry, other) for other in others))

    def _not_found(self, ref: AdapterRef, caller: Principal) -> Exception:
        if not self._is_synced:
            return StoreUnavailableError(
                f"adapter {str(ref)!r} cannot be looked up: the adapter store has not been reached yet",
                retry_after_s=1.0,
            )
        metadata = {"adapter": str(ref)}
        entry = self.entry(ref.name, caller)
        if entry is None:
            close = self._order.like(ref.name, is_visible=lambda known: _is_listed(self._entries[known], caller))
            hint = (
                f"; did you mean {', '.join(close)}?"
                if close
                else "; `loraplex adapters list` shows those that there are"
            )
            text = f"no adapter is named {ref.name!r} among those that {caller.name!r} may use{hint}"
            return AdapterNotFoundError(text, metadata=metadata)
        if ref.revision is not None:
            return AdapterNotFoundError(f"adapter {ref.name!r} has no revision {ref.revision}", metadata=metadata)
        if not entry.labels and entry.base_fingerprints:
            staged = ", ".join(f"{ref.name}@{digest[:12]}" for digest in [*entry.base_fingerprints][:MAX_CANDIDATES])
            return AdapterNotFoundError(
                f"adapter {ref.name!r} is staged and has no label yet: ask for {staged}, or set a label",
                metadata=metadata,
            )
        labels = ", ".join(sorted(entry.labels)) or "none: nothing has been imported"
        return AdapterNotFoundError(
            f"adapter {ref.name!r} has no label {ref.label!r}; its labels are {labels}", metadata=metadata
        )


def _resolved(entry: AdapterEntry, digest: str) -> ResolvedAdapter:
    return ResolvedAdapter(
        name=entry.name,
        digest=digest,
        base_fingerprint=entry.base_fingerprints[digest],
        is_restricted=bool(entry.allowed_tenants),
        text_parts=entry.text_parts.get(digest, ""),
        num_bytes=entry.num_bytes.get(digest, 0),
    )


def _is_listed(entry: AdapterEntry, caller: Principal) -> bool:
    return bool(entry.labels) and entry.allows(caller)
