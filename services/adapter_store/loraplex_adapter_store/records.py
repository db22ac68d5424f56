"""The store's records of adapters: names (mutable) and revisions (immutable).

A store keeps a hundred thousand of them. They are of a kind that Python's garbage collector does not look at (``gc=False``),
which it may do without as none can refer to itself: each full collection would else stop every call for half a second.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.errors import AdapterIncompatibleError, AdapterNotFoundError, ConflictError
from loraplex_common.ids import DEFAULT_LABEL, AdapterRef, find_revision
from loraplex_common.text_parts import TextPartsInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MAX_REVISIONS: Final = 100
"""Revisions kept per name; older ones without a label are released, so that frequent pushes do not grow without end."""

NO_SPLITS: Final[dict[str, dict[str, int]]] = {}
"""One for all records without a split label, which are nearly all; never changed."""
NO_COUNTERPARTS: Final[dict[str, dict[str, str]]] = {}
"""The same for records without revisions on other base models."""


@functools.lru_cache(maxsize=1024)
def _kept_once(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words; equal ones are the same object while they are used often."""
    return tuple(sys.intern(word) for word in words)


class Revision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One immutable set of weights, and what comes with them.

    Attributes:
        name: The name it was first imported under.
        create_time: Unix seconds.
        text_parts: What it brings besides weights; None for nothing.
    """

    revision: str
    name: str
    base_fingerprint: str
    max_rank: int
    num_parameters: int
    canonical_bytes: int
    target_modules: tuple[str, ...]
    num_layers: int
    source: str
    create_time: float
    text_parts: TextPartsInfo | None = None

    def to_json(self) -> str:
        """Encode for Valkey, without the text parts: they have a key of their own, as older replicas read this one."""
        fields = msgspec.structs.asdict(self)
        del fields["text_parts"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: str | bytes, text_parts: str | bytes | None = None, *, digest: str = "") -> Revision:
        """Decode what `to_json` wrote, and what is said of the text parts if there are any.

        Args:
            data: From `to_json`.
            text_parts: From `TextPartsInfo.to_json`.
            digest: The revision it is, if the caller has the text already: it is kept instead of an equal one.
        """
        fields: dict[str, Any] = msgspec.json.decode(data)
        info = TextPartsInfo.from_json(text_parts) if text_parts else None
        # A hundred thousand revisions have a few base models and sets of modules: these are kept once.
        shared = {
            "revision": digest or fields["revision"],
            "name": sys.intern(fields["name"]),
            "base_fingerprint": sys.intern(fields["base_fingerprint"]),
            "target_modules": _kept_once(tuple(fields["target_modules"])),
        }
        return cls(**{**fields, **shared, "text_parts": info})


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A name with its labels.

    Attributes:
        allowed_tenants: Tenants that may use it; empty means all tenants.
        labels: Label -> revision; of a split label, the one with the largest share.
        splits: Label -> revision -> weight, of split labels.
        counterparts: Revision -> another base's name -> the revision that the same files gave for that base.
        revisions: All revisions of this name, newest first.
        version: Rises with every change; the etag. 0 means that the name was never stored.
    """

    name: str
    description: str = ""
    allowed_tenants: tuple[str, ...] = ()
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    splits: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    counterparts: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    revisions: tuple[str, ...] = ()
    is_deleted: bool = False
    create_time: float = 0.0
    update_time: float = 0.0
    version: int = 0

    def to_json(self) -> str:
        """Encode for Valkey; what few records have is left out of others, as older replicas read the record too."""
        fields = msgspec.structs.asdict(self)
        for rare in ("splits", "counterparts"):
            if not fields[rare]:
                del fields[rare]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: str | bytes) -> AdapterRecord:
        """Decode what `to_json` wrote."""
        fields: dict[str, Any] = msgspec.json.decode(data)
        # JSON has a text anew wherever it occurs; in memory labels refer to the texts of `revisions`.
        digests = {digest: digest for digest in fields["revisions"]}
        own = {
            "name": sys.intern(fields["name"]),  # its revisions have it, too
            "allowed_tenants": tuple(sys.intern(tenant) for tenant in fields["allowed_tenants"]),
            "labels": {sys.intern(label): digests.get(at, at) for label, at in fields["labels"].items()},
            "revisions": tuple(digests),
        }
        return cls(**{"splits": NO_SPLITS, "counterparts": NO_COUNTERPARTS, **fields, **own})

    @property
    def etag(self) -> str:
        """Opaque version of the record (AIP-154)."""
        return f"v{self.version}"

    @property
    def labelled(self) -> frozenset[str]:
        """Revisions that some label points at, with those that stand for them on other base models."""
        pointed = frozenset(self.labels.values()).union(*self.splits.values())
        return pointed.union(*(self.counterparts.get(revision, {}).values() for revision in pointed))

    def shares_of(self, label: str) -> dict[str, int]:
        """Return the revisions that a label points at with their weights; empty if there is no such label."""
        if label in self.splits:
            return self.splits[label]
        return {self.labels[label]: 1} if label in self.labels else {}

    def is_visible_to(self, tenant: str, *, is_admin: bool) -> bool:
        """Return whether a tenant may use and see the adapter."""
        return is_admin or not self.allowed_tenants or tenant in self.allowed_tenants

    def as_shown_to(self, tenant: str, *, is_admin: bool) -> AdapterRecord:
        """Return the record as a tenant that may use the adapter sees it, without the other tenants' names."""
        if is_admin or not self.allowed_tenants:
            return self
        return msgspec.structs.replace(self, allowed_tenants=(tenant,))

    def resolve(self, ref: AdapterRef) -> str | None:
        """Return the revision that a reference means; None for an adapter without any revision.

        Raises:
            AdapterNotFoundError: If label or revision is unknown under this name.
            InvalidParameterError: If several of its revisions begin with the reference.
        """
        if ref.revision is not None:
            digest = find_revision(ref.revision, self.revisions, field="name")
            if digest is None:
                raise AdapterNotFoundError(f"adapter {self.name} has no revision {ref.revision}")
            return digest
        label = ref.label or DEFAULT_LABEL
        if label not in self.labels and label != DEFAULT_LABEL:
            raise AdapterNotFoundError(f"adapter {self.name} has no label {label!r}")
        return self.labels.get(label)

    def expect(self, label: str, revision: str | None) -> None:
        """Check that a label points at a revision; empty means that it must not exist, None expects nothing.

        Raises:
            ConflictError: If it does not.
        """
        current = self.labels.get(label, "")
        if revision is not None and revision != current:
            raise ConflictError(
                f"{self.name}:{label} points at {current or 'nothing'}, not at {revision or 'nothing'}: read again",
                metadata={"current_revision": current},
            )

    def touched(self, now: float, **changes: Any) -> AdapterRecord:
        """Return the record after a change, with the next version."""
        created = self.create_time or now
        return msgspec.structs.replace(self, **changes, version=self.version + 1, create_time=created, update_time=now)

    def with_import(
        self,
        revision: str,
        label: str,
        now: float,
        *,
        is_staged: bool,
        counterparts: Mapping[str, str] = MappingProxyType({}),
    ) -> AdapterRecord:
        """Return the record after an import: any ``label`` and, unless staged, ``latest`` point at the revision.

        ``counterparts`` (base name -> revision) take the place of those that the revision had.
        """
        moved = {name for name in (label, "" if is_staged else DEFAULT_LABEL) if name}
        labels = {**self.labels, **dict.fromkeys(sorted(moved), revision)}
        splits = {label: shares for label, shares in self.splits.items() if label not in moved}
        first = (revision, *counterparts.values())
        ordered = (*first, *(kept for kept in self.revisions if kept not in first))
        others = {known: bases for known, bases in self.counterparts.items() if known != revision}
        counterparts_by_revision = {**others, **({revision: dict(counterparts)} if counterparts else {})}
        new = self.touched(
            now,
            labels=labels,
            splits=splits,
            counterparts=counterparts_by_revision,
            revisions=ordered,
            is_deleted=False,
        )
        return new.without([kept for kept in ordered if kept not in new.labelled][MAX_REVISIONS:])

    def without(self, revisions: Collection[str]) -> AdapterRecord:
        """Return the record without some revisions, in the same version."""
        kept = tuple(kept for kept in self.revisions if kept not in revisions)
        bases = {
            revision: {base: other for base, other in others.items() if other in kept}
            for revision, others in self.counterparts.items()
            if revision in kept
        }
        return msgspec.structs.replace(
            self, revisions=kept, counterparts={each: of for each, of in bases.items() if of}
        )

    def with_alias(self, label: str, shares: Mapping[str, int], now: float) -> AdapterRecord:
        """Return the record after a label moved.

        Args:
            label: The label.
            shares: Revision -> weight; a single one is a plain label, none removes it.
            now: Unix seconds.

        Raises:
            AdapterIncompatibleError: If ``latest`` would be removed.
            AdapterNotFoundError: If a label to remove does not exist.
        """
        labels = dict(self.labels)
        splits = {name: kept for name, kept in self.splits.items() if name != label}
        if shares:
            # Equal weights leave the lowest digest, so that a rollback answers the same.
            labels[label] = max(sorted(shares), key=lambda revision: shares[revision])
            if len(shares) > 1:
                splits[label] = dict(shares)
            added = [revision for revision in shares if revision not in self.revisions]
            return self.touched(now, labels=labels, splits=splits, revisions=(*added, *self.revisions))
        if label == DEFAULT_LABEL:
            raise AdapterIncompatibleError(
                f"label {DEFAULT_LABEL!r} cannot be removed: delete the adapter or move the label"
            )
        if labels.pop(label, None) is None:
            raise AdapterNotFoundError(f"adapter {self.name} has no label {label!r}")
        return self.touched(now, labels=labels, splits=splits)

    def deleted(self, now: float) -> AdapterRecord:
        """Return the tombstone: the name stays known, its revisions are released."""
        return self.touched(now, labels={}, splits={}, counterparts={}, revisions=(), is_deleted=True)


class AdapterView(msgspec.Struct, frozen=True, gc=False):
    """A record together with its revisions, newest first."""

    record: AdapterRecord
    revisions: tuple[Revision, ...]

    def revision(self, digest: str | None) -> Revision | None:
        """Return one of the revisions by digest."""
        return next((revision for revision in self.revisions if revision.revision == digest), None)


@dataclass(frozen=True, slots=True)
class Position:
    """A state of the catalog.

    Attributes:
        history_id: The server's run and its line of replication. Sequences of two histories cannot be compared, because
            a server that starts may have an earlier state (a backup, an append-only file cut short), and so may a
            replica that takes over.
        sequence: Number of changes so far.
    """

    history_id: str
    sequence: int
