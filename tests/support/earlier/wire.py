"""Calls as bytes: a proxy that keeps them, and the file that they are kept in."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_CALLS: Final = 64  # under way at once, for ever watching ones included
CONNECT_TIMEOUT_S: Final = 60.0
NO_DEADLINE_S: Final = 1e6  # gRPC says more than this where a call has none
OWN_METADATA: Final = ("user-agent",)  # each hop's


@dataclass(kw_only=True, slots=True)
class WireCall:
    """One call, as it was on the wire.

    Attributes:
        face: The server that was called: ``gateway``, ``store`` or ``engine``.
        method: ``/loraplex.v1.GatewayService/Generate``.
        events: ``request`` or ``response`` and the message's bytes, in the order in which the proxy had them.
        code: gRPC's status; -1 if the caller left, or it ran on when the recording ended.
    """

    face: str
    method: str
    events: list[tuple[str, bytes]] = field(default_factory=list)
    code: int = -1

    def messages(self, direction: str) -> list[bytes]:
        """Return the messages of one direction, ``request`` or ``response``."""
        return [message for way, message in self.events if way == direction]


class WireRecorder(grpc.GenericRpcHandler):
    """A gRPC server on a free port that passes every call on, and keeps it.

    Attributes:
        target: Where it listens, ``host:port``.
    """

    def __init__(self, face: str, calls: list[WireCall]) -> None:
        self._face, self._calls = face, calls
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._is_connected = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(MAX_CALLS), handlers=[self])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def connect(self, upstream: str) -> None:
        """Say where calls go on to; they wait until then."""
        self._channel = grpc.insecure_channel(upstream)
        self._is_connected.set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return what passes a call on, whatever its method."""
        method = handler_call_details.method

        def pass_on(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._pass_on(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(pass_on)

    def _pass_on(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        call = WireCall(face=self._face, method=method)
        assert self._is_connected.wait(CONNECT_TIMEOUT_S)  # an engine is called as soon as it is registered
        assert self._channel is not None
        with self._lock:
            self._calls.append(call)

        def kept() -> Iterator[bytes]:
            for message in requests:
                call.events.append(("request", message))
                yield message

        metadata = [pair for pair in context.invocation_metadata() if pair[0] not in OWN_METADATA]
        left_s = context.time_remaining()
        onward: Any = self._channel.stream_stream(method)
        under_way = onward(kept(), timeout=left_s if left_s < NO_DEADLINE_S else None, metadata=metadata)
        context.add_callback(under_way.cancel)
        context.send_initial_metadata(under_way.initial_metadata())
        try:
            for message in under_way:
                call.events.append(("response", message))
                yield message
        except grpc.RpcError:
            call.code = under_way.code().value[0]
            context.set_trailing_metadata(tuple(under_way.trailing_metadata()))
            context.abort(under_way.code(), under_way.details())
        call.code = 0

    def close(self) -> None:
        """End the server and what it passes on."""
        self._server.stop(None).wait()
        if self._channel is not None:
            self._channel.close()


def write_calls(path: Path, calls: list[WireCall]) -> None:
    """Write calls to a file, the same bytes for the same calls."""
    rows = [
        {
            "face": call.face,
            "method": call.method,
            "code": call.code,
            "events": [[way, base64.b64encode(message).decode()] for way, message in call.events],
        }
        for call in calls
    ]
    path.write_bytes(gzip.compress(json.dumps(rows, indent=0).encode(), mtime=0))


def read_calls(path: Path) -> list[WireCall]:
    """Return the calls of a file."""
    return [
        WireCall(
            face=row["face"],
            method=row["method"],
            code=row["code"],
            events=[(way, base64.b64decode(message)) for way, message in row["events"]],
        )
        for row in json.loads(gzip.decompress(path.read_bytes()))
    ]
