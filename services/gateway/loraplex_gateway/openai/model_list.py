"""The body of GET /v1/models in ready pieces: one for each block of names, made anew only where a name has changed.

Adapters that every caller may use are in one piece for all callers. A caller that may use restricted ones besides gets
the blocks that have such an adapter joined for itself.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from loraplex_common.ids import DEFAULT_LABEL

from loraplex_gateway.openai.answers import ModelObject
from loraplex_gateway.requests.listing import ServedBase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.alias_feed import AdapterEntry
    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.name_blocks import NameBlock
    from loraplex_gateway.requests.listing import ModelListing

# Changes that come one after the other are taken in together.
SETTLE_S: Final = 0.5
# How soon a change of an engine is seen, which may change how long sequences may be.
LOOK_S: Final = 5.0
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the list.

    Attributes:
        id: What `model` may say.
        body: Its JSON object.
        allowed_tenants: Tenants that may use it; empty means all tenants.
    """

    id: str
    body: bytes
    allowed_tenants: frozenset[str] = frozenset()

    def allows(self, caller: Principal) -> bool:
        """Whether a caller may use what it names."""
        return not self.allowed_tenants or caller.name in self.allowed_tenants or caller.uses_all_adapters


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries that follow each other, and their JSON."""

    entries: tuple[Entry, ...]
    body: bytes

    @classmethod
    def of(cls, entries: tuple[Entry, ...]) -> Piece:
        """Join entries."""
        return cls(entries, b",".join(entry.body for entry in entries))


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A block of names: all its entries, and the piece that every caller may see.

    Attributes:
        bases: The base models as they were when it was made.
        tenants: Tenants that restricted adapters of the block are for.
    """

    bases: tuple[ServedBase, ...]
    all: Piece
    public: Piece
    tenants: frozenset[str]

    @classmethod
    def of(cls, bases: tuple[ServedBase, ...], entries: tuple[Entry, ...]) -> _Rendered:
        """Sort a block's entries by the callers that may see them."""
        everything = Piece.of(entries)
        tenants: frozenset[str] = frozenset().union(*(entry.allowed_tenants for entry in entries))
        public = tuple(entry for entry in entries if not entry.allowed_tenants) if tenants else entries
        return cls(bases, everything, Piece.of(public) if tenants else everything, tenants)

    def visible_to(self, caller: Principal) -> Piece:
        """Return what a caller may see of it."""
        if caller.uses_all_adapters:
            return self.all
        if caller.name in self.tenants:
            return Piece.of(tuple(entry for entry in self.all.entries if entry.allows(caller)))
        return self.public


class ModelList:
    """Lists what `model` may name.

    Args:
        listing: Knows base models and adapters.
    """

    def __init__(self, listing: ModelListing) -> None:
        self._listing = listing

    async def run(self) -> None:
        """Keep the pieces ready for ever, so that no caller waits for those that have changed."""
        while True:
            changed = self._listing.names.changed
            await self.refresh()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await changed.wait()
            await asyncio.sleep(SETTLE_S)

    async def refresh(self) -> None:
        """Make the pieces of the blocks that have changed; other tasks run between two of them."""
        bases = self._listing.bases()
        for block in self._listing.names.blocks():
            if _is_stale(block, bases):
                self._rendered(block, bases)
                await asyncio.sleep(0)

    async def pieces(self, caller: Principal) -> Iterator[Piece]:
        """Return everything that a caller may name, base models first, as it is at one moment; none is empty."""
        await self.refresh()
        bases = self._listing.bases()
        # What has changed during the refresh is a few blocks.
        rendered = [self._rendered(block, bases) for block in self._listing.names.blocks()]
        visible = (block.visible_to(caller) for block in rendered)
        return itertools.chain([self._base_piece(bases)], (piece for piece in visible if piece.entries))

    def page(self, caller: Principal, *, limit: int, after: str) -> tuple[Piece, bool]:
        """Return the entries behind one, at most so many, and whether there are more.

        Args:
            caller: The principal that asks.
            limit: Most entries.
            after: Id of the entry in front, which may be gone meanwhile; empty for the first page.
        """
        entries = tuple(itertools.islice(self._behind(after, caller), limit + 1))
        return Piece.of(entries[:limit]), len(entries) > limit

    def _behind(self, after: str, caller: Principal) -> Iterator[Entry]:
        bases = self._listing.bases()
        base_entries = self._base_piece(bases).entries
        place = next((n for n, entry in enumerate(base_entries, 1) if entry.id == after), None)
        if not after or place is not None:
            yield from base_entries[place or 0 :]
            after = ""
        name, _, label = after.partition(":")
        for block in self._listing.names.blocks(name):
            for entry in self._rendered(block, bases).visible_to(caller).entries:
                if tuple(entry.id.split(":")) > ((name, label) if label else (name,)):
                    yield entry

    def _base_piece(self, bases: tuple[ServedBase, ...]) -> Piece:
        models = (
            ModelObject(
                id=base.name, created=base.created, root=base.name, parent=None, max_model_len=base.max_model_len
            )
            for base in bases
        )
        return Piece.of(tuple(Entry(model.id, _encode(model)) for model in models))

    def _rendered(self, block: NameBlock, bases: tuple[ServedBase, ...]) -> _Rendered:
        if not _is_stale(block, bases):
            rendered: _Rendered = block.memo[_Rendered]
            return rendered
        known: dict[str, ServedBase] = {}
        for base in bases:
            known.setdefault(base.fingerprint, base)
        names = {base.name for base in bases}
        entries = (self._entries(entry, known, names) for entry in self._listing.names.entries_of(block))
        rendered = _Rendered.of(bases, tuple(itertools.chain.from_iterable(entries)))
        block.memo[_Rendered] = rendered
        return rendered

    def _entries(self, adapter: AdapterEntry, known: dict[str, ServedBase], names: set[str]) -> Iterator[Entry]:
        """Yield an adapter's entries: itself where it has the label that its name alone means, then its other labels."""
        labels = sorted(adapter.labels, key=lambda label: (label != DEFAULT_LABEL, label))
        for label in labels:
            digest = adapter.on_a_base(adapter.labels[label], known)
            if digest is None:
                continue  # a base model that this gateway does not speak for
            base = known[adapter.base_fingerprints[digest]]
            # Alone, the name of a base model and an adapter is refused.
            is_plain = label == DEFAULT_LABEL and adapter.name not in names
            shown = adapter.name if is_plain else f"{adapter.name}:{label}"
            model = ModelObject(
                id=shown,
                created=adapter.created.get(digest, 0),
                root=digest,
                parent=base.name,
                max_model_len=base.max_model_len,
            )
            yield Entry(shown, _encode(model), adapter.allowed_tenants)


def _is_stale(block: NameBlock, bases: tuple[ServedBase, ...]) -> bool:
    rendered: _Rendered | None = block.memo.get(_Rendered)
    return rendered is None or rendered.bases != bases
