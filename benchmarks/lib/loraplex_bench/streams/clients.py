"""Clients that keep what they read as it came, with the time, and look into it only when all is over."""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loraplex_bench.streams.shared_number import SharedNumber

if TYPE_CHECKING:
    from pathlib import Path

MAX_TOKENS: Final = 50_000
PROMPT: Final = "The quick brown fox"
_EVENT: Final = re.compile(rb"data: (.*)\n\n")
_TEXT: Final = re.compile(rb'"text":"((?:[^"\\]|\\.)*)"')
_ESCAPED: Final = re.compile(rb"\\.")


@dataclass
class Stream:
    """One stream: what came and when, in microseconds of the monotonic clock."""

    request_id: str
    pieces: list[tuple[int, bytes]] = field(default_factory=list)

    def take(self, data: bytes) -> None:
        """Keep a piece."""
        self.pieces.append((round(1e6 * time.monotonic()), data))


def run_client(kind: str, target: str, request_ids: list[str], folder: Path, name: str, connections: int) -> None:
    """Stream until a line on stdin says that it is enough; `target` may be several, with commas, that share the streams.

    Writes `folder`/`name`.json, counts in `name`.count.
    """
    count = SharedNumber(folder / f"{name}.count")
    streams = [Stream(request_id) for request_id in request_ids]
    if kind == "sse":
        _read_sse(target, streams, count)
        events = [_sse_events(stream) for stream in streams]
    else:
        run_loop(_read_grpc(target, streams, count, connections))
        events = [_grpc_events(stream) for stream in streams]
    result = {stream.request_id: each for stream, each in zip(streams, events, strict=True)}
    (folder / f"{name}.json").write_text(json.dumps(result))


# --- server-sent events, over bare sockets ---


def _read_sse(target: str, streams: list[Stream], count: SharedNumber) -> None:
    targets = target.split(",")
    selector, num_events = selectors.DefaultSelector(), 0
    selector.register(sys.stdin, selectors.EVENT_READ)
    for n, stream in enumerate(streams):
        host, _, port = targets[n % len(targets)].rpartition(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(_http_request(stream.request_id))
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, stream)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                selector.close()
                return
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            if not data:
                raise SystemExit(f"stream {key.data.request_id} ended: {key.data.pieces[-1][1][-500:]!r}")
            key.data.take(data)
            num_events += data.count(b"data: ")
        count.set(num_events)


def _http_request(request_id: str) -> bytes:
    body = json.dumps(
        {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "request_id": request_id,
        }
    ).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def _sse_events(stream: Stream) -> list[tuple[int, int]]:
    """Return when each event came, and of how many tokens."""
    events, rest = [], b""
    for at, data in stream.pieces:
        rest += data
        end = 0
        for event in _EVENT.finditer(rest):
            end = event.end()
            if text := _TEXT.search(event[1]):
                events.append((at, len(_ESCAPED.sub(b".", text[1]))))
        rest = rest[end:]
    return events


# --- gRPC ---


def run_loop(main: Any) -> None:
    """Run a coroutine on uvloop, where it is there."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _read_grpc(target: str, streams: list[Stream], count: SharedNumber, connections: int) -> None:
    import grpc
    from loraplex.v1 import gateway_pb2

    options = (("grpc.use_local_subchannel_pool", 1),)
    targets = target.split(",")
    channels = [grpc.aio.insecure_channel(targets[n % len(targets)], options=options) for n in range(connections)]
    stopping = gateway_pb2.StoppingParams(max_new_tokens=MAX_TOKENS, ignore_eos=True)
    num_events = 0

    async def read(stream: Stream, channel: grpc.aio.Channel) -> None:
        nonlocal num_events
        call: Any = channel.unary_stream(
            "/loraplex.v1.GatewayService/Generate",
            request_serializer=gateway_pb2.GenerateRequest.SerializeToString,
        )
        request = gateway_pb2.GenerateRequest(text=PROMPT, stopping=stopping, request_id=stream.request_id)
        async for data in call(request):
            stream.take(data)
            num_events += 1
            count.set(num_events)
        raise SystemExit(f"stream {stream.request_id} ended")

    tasks = [
        asyncio.create_task(read(stream, channels[n % connections]), name=stream.request_id)
        for n, stream in enumerate(streams)
    ]
    told = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, told.set)
    waiting = asyncio.create_task(told.wait(), name="told")
    done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    for channel in channels:
        await channel.close(None)
    await asyncio.gather(*tasks, return_exceptions=True)


def _grpc_events(stream: Stream) -> list[tuple[int, int]]:
    """Return when each message with tokens came, and with how many."""
    from loraplex.v1 import gateway_pb2

    messages = [(at, gateway_pb2.GenerateResponse.FromString(data)) for at, data in stream.pieces]
    return [(at, len(message.chunk.token_ids)) for at, message in messages if message.chunk.token_ids]
