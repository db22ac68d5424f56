"""Converts between the contract's messages and the store's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common.ids import DEFAULT_LABEL

from loraplex_adapter_store import alias_wire
from loraplex_adapter_store.alias_wire import fill_time, timestamp

if TYPE_CHECKING:
    from loraplex_adapter_store.alias_update import AliasUpdate
    from loraplex_adapter_store.imports.progress import Progress
    from loraplex_adapter_store.imports.targets import ImportOutcome
    from loraplex_adapter_store.records import AdapterRecord, AdapterView, Revision
    from loraplex_adapter_store.visibility import Visibility

# Looked up once: a message's own enums take a microsecond each.
_DELETED, _READY, _EMPTY = (
    adapter_pb2.Adapter.STATE_DELETED,
    adapter_pb2.Adapter.STATE_READY,
    adapter_pb2.Adapter.STATE_EMPTY,
)


def revision(source: Revision) -> adapter_pb2.AdapterRevision:
    """Convert a revision."""
    message = adapter_pb2.AdapterRevision()
    fill_revision(message, source)
    return message


def fill_revision(message: adapter_pb2.AdapterRevision, source: Revision) -> None:
    """Write a revision into an empty message: a message that is given to another one's constructor is copied."""
    message.revision = source.revision
    message.name = source.name
    message.base_fingerprint = source.base_fingerprint
    message.max_rank = source.max_rank
    message.num_parameters = source.num_parameters
    message.canonical_bytes = source.canonical_bytes
    message.target_modules.extend(source.target_modules)
    message.num_layers = source.num_layers
    message.source = source.source
    fill_time(message.create_time, source.create_time)
    if source.text_parts is not None:
        message.text_parts.digest = source.text_parts.digest
        message.text_parts.kinds.extend(source.text_parts.kinds)


def adapter(record: AdapterRecord, latest: Revision | None) -> adapter_pb2.Adapter:
    """Convert a record and the revision that ``latest`` points at."""
    message = adapter_pb2.Adapter()
    fill_adapter(message, record, latest)
    return message


def fill_adapter(message: adapter_pb2.Adapter, record: AdapterRecord, latest: Revision | None) -> None:
    """Write a record, and the revision that ``latest`` points at, into an empty message."""
    message.name = record.name
    message.state = _DELETED if record.is_deleted else _READY if record.labels else _EMPTY
    message.description = record.description
    message.etag = record.etag
    message.allowed_tenants.extend(record.allowed_tenants)
    fill_time(message.create_time, record.create_time)
    fill_time(message.update_time, record.update_time)
    if latest is not None:
        fill_revision(message.latest, latest)
    alias_wire.fill_aliases(message, record)
    if record.counterparts:
        message.counterparts.extend(alias_wire.counterparts(record))


def fill_entry(
    message: adapter_store_pb2.WatchAliasesResponse.Entry, view: AdapterView, *, with_text_parts: bool = True
) -> None:
    """Write a view for watchers into an empty message; those that use no text parts are not told of revisions that have some."""
    record = view.record
    message.name = record.name
    message.deleted = record.is_deleted
    message.allowed_tenants.extend(record.allowed_tenants)
    alias_wire.fill_aliases(message, record)
    if record.counterparts:
        message.counterparts.extend(alias_wire.counterparts(record))
    for source in view.revisions:
        if with_text_parts or source.text_parts is None:
            fill_revision(message.revisions.add(), source)


def alias_update(update: AliasUpdate, *, with_text_parts: bool = True) -> adapter_store_pb2.WatchAliasesResponse:
    """Convert a change of the name table; see `entry`."""
    message = adapter_store_pb2.WatchAliasesResponse(
        sequence=update.position.sequence,
        history_id=update.position.history_id,
        snapshot_start=update.is_snapshot_start,
        snapshot_end=update.is_snapshot_end,
    )
    for view in update.views:
        fill_entry(message.entries.add(), view, with_text_parts=with_text_parts)
    return message


def import_metadata(progress: Progress) -> adapter_store_pb2.ImportAdapterMetadata:
    """Convert the progress of an import."""
    return adapter_store_pb2.ImportAdapterMetadata(
        name=progress.name,
        stage=adapter_store_pb2.ImportAdapterMetadata.Stage.ValueType(progress.stage.value),
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        create_time=timestamp(progress.created_at),
    )


def import_result(outcome: ImportOutcome) -> adapter_store_pb2.ImportAdapterResult:
    """Convert a finished import."""
    return adapter_store_pb2.ImportAdapterResult(
        adapter=adapter(outcome.record, outcome.revision),
        revision=revision(outcome.revision),
        already_existed=outcome.already_existed,
        warnings=outcome.warnings,
        visibility=visibility(outcome.visibility),
    )


def visibility(known: Visibility) -> adapter_store_pb2.Visibility:
    """Convert which gateways know of a change."""
    timeout = Duration()
    timeout.FromNanoseconds(round(known.timeout_s * 1e9))
    return adapter_store_pb2.Visibility(gateways=known.gateways, late_gateways=known.late, timeout=timeout)


def latest_of(record: AdapterRecord) -> str | None:
    """Return the digest that ``latest`` points at."""
    return record.labels.get(DEFAULT_LABEL)
