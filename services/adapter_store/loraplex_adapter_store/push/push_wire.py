"""Converts between the contract's messages and a push."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import InvalidParameterError

from loraplex_adapter_store import wire
from loraplex_adapter_store.push.pusher import MAX_READY_TIMEOUT_S, READY_TIMEOUT_S, PushOutcome
from loraplex_adapter_store.push.tensor_stream import Finish, Part, PushedAdapter, PushedTensor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator


def adapter(header: pb.PushAdapterRequest.Header) -> PushedAdapter:
    """Convert what a header announces."""
    tensors = (PushedTensor(each.name, each.dtype, tuple(each.shape)) for each in header.tensors)
    return PushedAdapter(header.adapter_config, tuple(tensors))


def ready_timeout_s(header: pb.PushAdapterRequest.Header) -> float:
    """Return how long labels wait for engines.

    Raises:
        InvalidParameterError: If it is negative or too long.
    """
    if not header.HasField("ready_timeout"):
        return READY_TIMEOUT_S
    seconds = header.ready_timeout.seconds + header.ready_timeout.nanos * 1e-9
    if not 0 <= seconds <= MAX_READY_TIMEOUT_S:
        raise InvalidParameterError(
            f"ready_timeout: {seconds:g} s is not between 0 and {MAX_READY_TIMEOUT_S:g} s", field="header.ready_timeout"
        )
    return seconds


async def parts(messages: AsyncIterator[pb.PushAdapterRequest]) -> AsyncGenerator[Part, None]:
    """Yield what comes behind the header.

    Raises:
        InvalidParameterError: If it is neither data nor the finish.
    """
    async for message in messages:
        match message.WhichOneof("part"):
            case "data":
                yield message.data
            case "finish":
                yield Finish(message.finish.sha256)
            case kind:
                raise InvalidParameterError(f"message {kind} may not come behind the header", field="part")


def response(outcome: PushOutcome) -> pb.PushAdapterResponse:
    """Convert a finished push."""
    imported = wire.import_result(outcome.imported)
    timeout = Duration()
    timeout.FromNanoseconds(round(outcome.ready_timeout_s * 1e9))
    return pb.PushAdapterResponse(
        adapter=imported.adapter,
        revision=imported.revision,
        already_existed=imported.already_existed,
        warnings=imported.warnings,
        ready_engines=outcome.engines.ready,
        late_engines=outcome.engines.late,
        ready_timeout=timeout,
        visibility=imported.visibility,
    )
