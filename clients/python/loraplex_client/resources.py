"""What the servers keep: models, adapters, revisions, imports. Frozen values, free of wire types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum


class AdapterState(Enum):
    """Whether an adapter can be named in a request."""

    EMPTY = "empty"
    READY = "ready"
    DELETED = "deleted"


class ImportStage(Enum):
    """Where an import stands."""

    PENDING = "pending"
    FETCHING = "fetching"
    VALIDATING = "validating"
    STORING = "storing"
    DONE = "done"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Something that ``model`` or ``adapter`` can name.

    Attributes:
        base_model: The base model it belongs to; its own name for a base model.
        revision: Digest of the weights; empty for a base model.
        aliases: Label -> revision.
        num_engines_resident: Engines on whose device it is resident.
    """

    name: str
    base_model: str
    revision: str
    aliases: Mapping[str, str]
    max_model_len: int
    num_engines_resident: int

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter, not a base model."""
        return bool(self.revision)


@dataclass(frozen=True, kw_only=True, slots=True)
class Revision:
    """One immutable set of LoRA weights.

    Attributes:
        digest: sha256 over canonical config, tensors and text parts, 64 hex digits.
        source: Where it came from, e.g. ``hf:org/repo@<40 hex>``, ``upload``.
        text_parts: Names of what it brings besides weights, e.g. ``chat_template``, ``stop_tokens``.
    """

    digest: str
    name: str
    base_fingerprint: str
    max_rank: int
    num_parameters: int
    canonical_bytes: int
    target_modules: tuple[str, ...]
    num_layers: int
    source: str
    create_time: datetime | None
    text_parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A name that points at revisions.

    Attributes:
        aliases: Label -> revision digest, for a split label its largest share's; ``latest`` moves with every import.
        shares: Label -> revision digest -> weight, of the labels that are split.
        etag: Version of this resource, for optimistic concurrency.
        latest: The revision that ``latest`` points at.
        resolved: The revision that the name asked for resolves to; only from ``get``.
    """

    name: str
    state: AdapterState
    description: str
    allowed_tenants: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    etag: str
    create_time: datetime | None
    update_time: datetime | None
    latest: Revision | None
    shares: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    resolved: Revision | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportProgress:
    """How far an import has come; ``bytes_total`` is 0 while unknown."""

    stage: ImportStage
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportResult:
    """What an import brought.

    Attributes:
        already_existed: Whether the store had this revision before.
        warnings: What is odd about the adapter though it is served, or could not be told for certain.
        late_gateways: Gateways that did not serve it yet when the time for that was over; empty if all do.
    """

    adapter: Adapter
    revision: Revision
    already_existed: bool
    warnings: tuple[str, ...] = ()
    late_gateways: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult(ImportResult):
    """What a push brought.

    Attributes:
        ready_engines: Engines that held the new revision when the labels moved.
        late_engines: Engines that held the revision which the labels left, and not the new one, when the time was over.
        ready_timeout_s: How long the labels would have waited for them.
    """

    ready_engines: tuple[str, ...] = ()
    late_engines: tuple[str, ...] = ()
    ready_timeout_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMove:
    """One move of a label.

    Attributes:
        left_revision: Where it pointed before; empty if there was no such label.
        revision: Where it pointed then; empty if it was removed.
        cause: What moved it: ``import``, ``push``, ``alias``, ``rollback`` or ``delete``.
        shares: Revision -> weight, if it was split.
    """

    label: str
    left_revision: str
    revision: str
    cause: str
    time: datetime | None
    shares: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """A label that was rolled back: where it pointed, and where it points now."""

    adapter: Adapter
    left_revision: str
    revision: str


ProgressCallback = Callable[[ImportProgress], None]
"""Called from the waiting thread or task as an import proceeds."""
