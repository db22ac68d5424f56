"""Converts between the contract's messages and the store's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import crc32c
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common import geometry_wire
from loraplex_common.adapter_image import ImageError
from loraplex_common.error_status import to_status
from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError
from loraplex_common.ids import DEFAULT_LABEL, is_digest

from loraplex_adapter_store import alias_wire
from loraplex_adapter_store.alias_wire import fill_time, timestamp
from loraplex_adapter_store.attach.messages import (
    Ack,
    ArenaInfo,
    Chunk,
    Decline,
    Drop,
    Filled,
    FromEngine,
    Grant,
    HeldImage,
    Hello,
    Offer,
    Place,
    Refuse,
    Residency,
    ToEngine,
    Want,
)

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry

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
_PLACES = {adapter_pb2.TIER_DEVICE: Place.DEVICE, adapter_pb2.TIER_ARENA: Place.ARENA}


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


def _digest(text: str, field: str) -> str:
    if not is_digest(text):
        raise InvalidParameterError(f"{text[:80]!r} is no digest: 64 lower-case hex digits", field=field)
    return text


def _held(message: adapter_store_pb2.AttachEngineRequest.Held) -> HeldImage:
    return HeldImage(
        digest=_digest(message.digest, "held.digest"),
        place=_PLACES.get(message.tier, Place.GONE),
        generation=message.generation,
        num_leases=message.num_leases,
    )


def geometry(message: adapter_pb2.Geometry) -> Geometry:
    """Convert a geometry.

    Raises:
        AdapterIncompatibleError: If this store does not know its layout version or dtype, or it makes no sense.
    """
    try:
        return geometry_wire.from_message(message)
    except ImageError as error:
        raise AdapterIncompatibleError(f"engine and store do not agree on the image: {error}") from error


def hello(message: adapter_store_pb2.AttachEngineRequest) -> Hello:
    """Convert the first message of an engine.

    Raises:
        InvalidParameterError: If it is not a hello, or lacks a required field.
    """
    if message.WhichOneof("message") != "hello":
        raise InvalidParameterError("the first message must be a hello", field="hello")
    source = message.hello
    if not source.engine_id or len(source.engine_id) > 256:
        raise InvalidParameterError("engine_id is empty or longer than 256 characters", field="hello.engine_id")
    shape = geometry(source.geometry)
    if len(source.arenas) != shape.tp_degree:
        raise InvalidParameterError(
            f"{len(source.arenas)} arenas for tensor-parallel degree {shape.tp_degree}", field="hello.arenas"
        )
    return Hello(
        engine_id=source.engine_id,
        base_name=source.base_model.name,
        base_fingerprint=source.base_model.fingerprint,
        geometry=shape,
        arenas=tuple(_arena(arena) for arena in source.arenas),
        held=tuple(held for held in map(_held, source.held) if held.place is not Place.GONE),
        sequence=source.sequence,
        max_image_pages=source.max_image_pages,
        max_rank=source.max_rank,
        weight_norms=_weight_norms(source, shape),
        max_added_tokens=source.max_added_tokens,
        takes_tree_digests=source.takes_tree_digests,
    )


def _weight_norms(hello: adapter_store_pb2.AttachEngineRequest.Hello, shape: Geometry) -> tuple[float, ...]:
    norms, expected = tuple(hello.weight_norms), sum(len(layer) for layer in shape.decoder_layers)
    if norms and len(norms) != expected:
        raise InvalidParameterError(f"{len(norms)} norms for {expected} projections", field="hello.weight_norms")
    return norms


def _arena(message: adapter_store_pb2.AttachEngineRequest.Arena) -> ArenaInfo:
    return ArenaInfo(
        num_slots=message.num_slots,
        num_free=message.num_free,
        pid=message.pid,
        fd=message.fd,
        header_bytes=message.header_bytes,
        nonce=message.nonce,
    )


def _want(message: adapter_store_pb2.AttachEngineRequest.Want) -> Want:
    left = message.time_left
    time_left_s = left.seconds + left.nanos * 1e-9 if message.HasField("time_left") else None
    return Want(_digest(message.digest, "want.digest"), time_left_s, message.traceparent)


def from_engine(message: adapter_store_pb2.AttachEngineRequest) -> FromEngine:
    """Convert any later message of an engine.

    Raises:
        InvalidParameterError: If no such message may come now.
    """
    match message.WhichOneof("message"):
        case "want":
            return _want(message.want)
        case "grant":
            return Grant(_digest(message.grant.digest, "grant.digest"), message.grant.rank, tuple(message.grant.slots))
        case "decline":
            return Decline(_digest(message.decline.digest, "decline.digest"))
        case "residency":
            failed = message.residency.HasField("error") and message.residency.error.code != 0
            failure = message.residency.error.message or "unspecified" if failed else None
            return Residency(message.residency.sequence, _held(message.residency.held), failure)
        case other:
            raise InvalidParameterError(f"message {other} may not come now", field="message")


def to_engine(message: ToEngine) -> adapter_store_pb2.AttachEngineResponse:
    """Convert a message to an engine."""
    response = adapter_store_pb2.AttachEngineResponse()
    match message:
        case Offer():
            response.offer.digest = message.digest
            response.offer.rank = message.rank
            response.offer.num_pages = message.num_pages
            response.offer.image_sha256 = message.image_sha256
            response.offer.wanted = message.is_wanted
            response.offer.spec = message.spec
            response.offer.expected = message.is_expected
        case Chunk():
            response.chunk.digest = message.digest
            response.chunk.rank = message.rank
            response.chunk.offset = message.offset
            response.chunk.data = message.data
            response.chunk.crc32c = crc32c.crc32c(message.data)
        case Filled():
            response.filled.digest = message.digest
            response.filled.rank = message.rank
            response.filled.image_tree_sha256 = message.tree_sha256
        case Refuse():
            response.refuse.digest = message.digest
            response.refuse.status.CopyFrom(to_status(message.error))
        case Drop():
            response.drop.digest = message.digest
        case Ack():
            response.ack.sequence = message.sequence
            response.ack.num_held = message.num_held
    return response
