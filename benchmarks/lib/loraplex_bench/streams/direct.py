"""Writes the events of a gateway straight to its clients: what a measured latency would be without any gateway.

The messages are as long as the gateway's, and a step gives each stream one. Server-sent events go through one `write` of the
transport each, gRPC messages through one of a task that each stream has: there is no cheaper way with these libraries.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex.v1 import gateway_pb2

from loraplex_bench.streams.shared_number import SharedNumber

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

METHOD: Final = "/loraplex.v1.GatewayService/Generate"
TEXT: Final = "A"
HEADERS: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


@dataclass(eq=False)
class Stream:
    """One client's stream: where its events go, and when each was due."""

    write: Callable[[], None]
    times: list[int] = field(default_factory=list)


class DirectServer:
    """Gives every stream an event each step, of which there are `pace` a second.

    Args:
        pace: Steps a second, above 0.
        log: Gets a JSON line for each stream that ends, as the log of an engine double.
    """

    def __init__(self, pace: SharedNumber, log: Path) -> None:
        self._pace = pace
        self._log = log
        self._streams: dict[str, Stream] = {}
        self._has_streams = asyncio.Event()

    def begin(self, request_id: str, write: Callable[[], None]) -> None:
        """Give a stream events from the next step on."""
        self._streams[request_id] = Stream(write)
        self._has_streams.set()

    def end(self, request_id: str) -> None:
        """Write down what a stream got."""
        if (stream := self._streams.pop(request_id, None)) is not None:
            with self._log.open("a") as file:
                file.write(json.dumps([request_id, stream.times]) + "\n")

    async def run(self) -> None:
        """Step until cancelled; a server that is late does not make up for it in a burst."""
        due = time.monotonic()
        while await self._has_streams.wait():
            rate, now = self._pace.get(), time.monotonic()
            due = max(due + 1 / rate, now - 1 / rate)
            await asyncio.sleep(max(0.0, due - now))
            at = round(1e6 * time.monotonic())
            for stream in list(self._streams.values()):
                stream.times.append(at)
                stream.write()
            if not self._streams:
                self._has_streams.clear()


class _SseProtocol(asyncio.Protocol):
    """Reads one request, whose body comes with its headers or after them, and then streams."""

    def __init__(self, server: DirectServer) -> None:
        self._server = server
        self._received = b""
        self._request_id = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        _, _, body = self._received.partition(b"\r\n\r\n")
        if self._request_id or not body.endswith(b"}"):
            return
        self._request_id = json.loads(body)["request_id"]
        frame = _sse_frame(self._request_id)
        self._transport.write(HEADERS)
        self._server.begin(self._request_id, lambda: self._transport.write(frame))

    def connection_lost(self, _: Exception | None) -> None:
        self._server.end(self._request_id)


def _sse_frame(request_id: str) -> bytes:
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": None}
    head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": "tiny"}
    event = json.dumps({**head, "system_fingerprint": None, "choices": [choice]}, separators=(",", ":")).encode()
    data = b"data: %b\n\n" % event
    return b"%x\r\n%b\r\n" % (len(data), data)


def _grpc_handler(server: DirectServer) -> grpc.GenericRpcHandler:
    message = gateway_pb2.GenerateResponse(chunk=gateway_pb2.Chunk(sequence=9, index=9, token_ids=[10], text=TEXT))
    data = message.SerializeToString()

    async def generate(request: gateway_pb2.GenerateRequest, _: Any) -> AsyncIterator[bytes]:
        has_news, num_due = asyncio.Event(), 0

        def write() -> None:
            nonlocal num_due
            num_due += 1
            has_news.set()

        server.begin(request.request_id, write)
        try:
            while True:
                await has_news.wait()
                has_news.clear()
                while num_due:
                    num_due -= 1
                    yield data
        finally:
            server.end(request.request_id)

    handler: Any = grpc.unary_stream_rpc_method_handler(
        generate, request_deserializer=gateway_pb2.GenerateRequest.FromString
    )
    service, _, method = METHOD[1:].partition("/")
    return grpc.method_handlers_generic_handler(service, {method: handler})


async def serve_sse(direct: DirectServer) -> asyncio.Server:
    """Start to serve server-sent events on a free port."""
    return await asyncio.get_running_loop().create_server(lambda: _SseProtocol(direct), "127.0.0.1", 0)


async def run_direct(folder: Path, name: str) -> None:
    """Serve both faces until killed; `folder` has its pace and its log. Prints its addresses as a gateway does."""
    direct = DirectServer(SharedNumber(folder / "pace"), folder / f"{name}.log")
    grpc_server = grpc.aio.server()
    grpc_server.add_generic_rpc_handlers((_grpc_handler(direct),))
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    http = await serve_sse(direct)
    print(f"ready: grpc=127.0.0.1:{grpc_port} http=127.0.0.1:{http.sockets[0].getsockname()[1]}", flush=True)
    await direct.run()
