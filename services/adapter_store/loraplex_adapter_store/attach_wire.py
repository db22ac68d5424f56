"""Converts between the messages of AttachEngine and the store's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import crc32c
from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common import geometry_wire
from loraplex_common.adapter_image import ImageError
from loraplex_common.error_status import to_status
from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError
from loraplex_common.ids import is_digest

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
    Written,
)

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry

_PLACES: Final = {adapter_pb2.TIER_DEVICE: Place.DEVICE, adapter_pb2.TIER_ARENA: Place.ARENA}


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
        takes_written=source.takes_written,
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
        case Written():
            response.written.digest = message.digest
            response.written.rank = message.rank
            response.written.pages.extend(message.pages)
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
