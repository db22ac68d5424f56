"""What an import is asked to do, and how it ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec
from loraplex_common.errors import TenantQuotaError
from loraplex_common.ids import DEFAULT_LABEL

from loraplex_adapter_store.answers import Answer
from loraplex_adapter_store.records import AdapterRecord, Revision
from loraplex_adapter_store.visibility import Visibility


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportTarget:
    """The name that an import is stored under, and what it is checked against.

    Attributes:
        label: Label to move in addition to ``latest``; may be empty.
        base_model: Base model to use instead of the checkpoint's own declaration; may be empty.
        also: Names of further base models that the files are imported for.
        content: Digest of all that the request asks for, without its request_id.
        is_staged: Whether ``latest`` stays where it is.
        expected: Where `expected_label` must point when the import is stored; empty means nowhere, None anywhere.
        expected_label: The label that `expected` is about.
        kind: The call, as answers and moves of labels name it.
        tenants: Tenants that a new name is for, and one that comes back after its deletion; none leaves the name's own. One
            that is there keeps its own in any case.
        description: Description of a name that gets `tenants`.
        make_room: Deletes adapters of the tenant for so many further bytes, and returns whether they fit then; None never
            does. It is given the refusal, too.
        release: Takes revisions out of the record as it is after the import; None takes out none.
    """

    name: str
    label: str = ""
    base_model: str = ""
    also: tuple[str, ...] = ()
    request_id: str = ""
    content: str = ""
    is_staged: bool = False
    expected: str | None = None
    expected_label: str = DEFAULT_LABEL
    kind: str = "import"
    tenants: tuple[str, ...] = ()
    description: str = ""
    make_room: Callable[[int, TenantQuotaError], Awaitable[bool]] | None = None
    release: Callable[[AdapterRecord], AdapterRecord] | None = None

    @property
    def asked(self) -> Answer:
        """What the request asks for; compared with what an earlier request of this id asked for."""
        return Answer(self.kind, self.name, content=self.content)

    @property
    def shares_work(self) -> tuple[str, ...]:
        """What imports of one source have to have in common to share the work; revisions for further bases need a name."""
        return (self.base_model, *self.also, self.name) if self.also else (self.base_model,)

    def for_base(self, base_model: str) -> ImportTarget:
        """Return the target of the same files for one of the further base models: under no label, for the same tenants."""
        bare = replace(self, label="", request_id="", content="", is_staged=True, expected=None, release=None)
        return replace(bare, base_model=base_model, also=())

    @property
    def facts(self) -> dict[str, str]:
        """What a line of the log says of the request besides its name."""
        return {"tenants": ", ".join(self.tenants)} if self.tenants else {}

    def tenants_of(self, record: AdapterRecord | None) -> tuple[str, ...]:
        """Return the tenants of the name, once its import is stored; none if it is for all."""
        if record is None or (record.is_deleted and self.tenants):
            return self.tenants
        return record.allowed_tenants

    def applied(
        self, old: AdapterRecord, revision: str, now: float, counterparts: Mapping[str, str] = MappingProxyType({})
    ) -> AdapterRecord:
        """Return a record after the import of a revision, which may have counterparts for further base models.

        Raises:
            ConflictError: If the label is not where it is expected.
        """
        old.expect(self.expected_label, self.expected)
        if self.tenants and (not old.version or old.is_deleted):
            old = msgspec.structs.replace(old, allowed_tenants=self.tenants, description=self.description)
        new = old.with_import(revision, self.label, now, is_staged=self.is_staged, counterparts=counterparts)
        return new if self.release is None else self.release(new)


@dataclass(frozen=True, slots=True)
class Written:
    """Weights that are written and belong to no name yet; collected unless `Importer.commit` comes in time.

    Attributes:
        already_existed: Whether the store had them before.
        seconds: Time that checking and writing took.
        signer: Name of the signer of the files; may be empty.
    """

    revision: Revision
    already_existed: bool
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    signer: str = ""


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """A finished import."""

    record: AdapterRecord
    revision: Revision
    already_existed: bool
    warnings: tuple[str, ...] = ()
    visibility: Visibility = field(default_factory=Visibility)
    signer: str = ""

    def facts(self, target: ImportTarget) -> dict[str, str]:
        """Return what a line of the log says of an import's end."""
        signer = {"signer": self.signer} if self.signer else {}
        return {"revision": self.revision.revision, "label": target.label} | signer
