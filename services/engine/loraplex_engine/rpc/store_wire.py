"""Converts between the contract's messages and the engine's types on the line to the adapter store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from loraplex.v1 import adapter_store_pb2

from loraplex_engine.rpc import wire
from loraplex_engine.rpc.image_offer import ImageOffer

if TYPE_CHECKING:
    from loraplex_engine.messages import ResidencyChanged, WantImage

_Request = adapter_store_pb2.AttachEngineRequest
_Response = adapter_store_pb2.AttachEngineResponse


def offer(message: _Response.Offer) -> ImageOffer:
    """Convert an offer."""
    return ImageOffer(
        digest=message.digest,
        rank=message.rank,
        num_pages=message.num_pages,
        image_sha256=message.image_sha256,
        is_wanted=message.wanted,
        is_expected=message.expected,
        spec=message.spec,
    )


def want(event: WantImage) -> _Request:
    """Convert a want."""
    message = _Request.Want(digest=event.digest, traceparent=event.traceparent)
    if event.deadline_s is not None:
        message.time_left.CopyFrom(wire.duration(max(0.0, event.deadline_s - time.monotonic())))
    return _Request(want=message)


def held(event: ResidencyChanged) -> _Request.Held:
    """Convert the state of an adapter."""
    return _Request.Held(
        digest=event.digest,
        tier=wire.tier(event.state),
        generation=event.generation,
        num_leases=event.num_leases,
    )
