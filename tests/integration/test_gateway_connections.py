"""Connections and bodies that only wait keep no other caller out and hold no memory to speak of."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import CancelledRequestError, DeadlineError, SaturatedError
from loraplex_gateway.openai.body_reader import FREE_BYTES, MAX_BODY_BYTES, BodyReader
from starlette.requests import Request
from support.gateway_rig import MODEL_NAME, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration
BODY = json.dumps({"model": MODEL_NAME, "prompt": "the quick", "max_tokens": 2}).encode()


async def complete(rig: Rig, body: bytes = BODY) -> int:
    """Return the status of a completion on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body)
    async with asyncio.timeout(20):
        status = await reader.readline()
    writer.close()
    return int(status.split()[1])


@asynccontextmanager
async def connections(rig: Rig, num: int, hello: bytes = b"") -> AsyncIterator[list[asyncio.StreamReader]]:
    opened = []
    for _ in range(num):
        with suppress(ConnectionError):
            opened.append(await asyncio.open_connection("127.0.0.1", rig.app.http_port))
            opened[-1][1].write(hello)
    yield [reader for reader, _ in opened]
    for _, writer in opened:
        writer.close()


@pytest.mark.parametrize("hello", [b"", b"POST /v1/comple"], ids=["idle", "half a header"])
async def test_idle_connections_make_room_for_those_that_ask(valkey_url: str, hello: bytes) -> None:
    async with running_gateway(valkey_url, max_connections=8) as rig, connections(rig, 40, hello):
        assert [await complete(rig) for _ in range(3)] == [200] * 3
        assert rig.app.http.connections.num_open <= 8


async def test_a_header_that_does_not_end_is_waited_for_only_so_long(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.app.http.connections.header_s = 0.2
        async with connections(rig, 1, b"GET /health HTTP/1.1\r\nx-slow: ") as (reader,):
            async with asyncio.timeout(20):
                assert await reader.read() == b""


async def test_an_old_connection_ends_after_an_answer_that_says_so(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_connection_age_s=0.5) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
        has_ended = [False]
        async with asyncio.timeout(20):
            while not has_ended[-1]:
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
                has_ended.append(b"connection: close" in head)
                await asyncio.sleep(0.05)
            assert await reader.read() == b""
        assert len(has_ended) > 3, "a young connection goes on"
        writer.close()


async def test_a_large_body_is_answered_and_leaves_nothing_held(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        big = json.dumps({"model": MODEL_NAME, "prompt": "a" * 4_000_000, "max_tokens": 2}).encode()

        assert await complete(rig, big) == 400
        assert await complete(rig) == 200
        rig.app.workers.check_integrity()


async def test_who_sends_too_much_hears_why(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        assert await complete(rig, b" " * (MAX_BODY_BYTES + 1_000_000)) == 413


async def test_a_role_of_four_megabytes_stops_nobodys_tokens(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        message = {"role": "r" * 4_000_000, "content": "a"}
        big = json.dumps({"model": MODEL_NAME, "messages": [message], "max_tokens": 1}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(big)}\r\n\r\n".encode()
        writer.write(head + big)

        async with asyncio.timeout(5):  # it took 8 s and more
            answer = await reader.read(4096)

        assert b" 400 " in answer.split(b"\r\n")[0]
        assert b"context_length_exceeded" in answer
        writer.close()


class Trickle:
    """A body of which parts come when they are let."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = [*parts]
        self.more = asyncio.Event()

    async def receive(self) -> dict[str, object]:
        if not self.parts:
            await self.more.wait()
        body = self.parts.pop(0) if self.parts else b""
        return {"type": "http.request", "body": body, "more_body": not self.more.is_set() or bool(self.parts)}

    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "headers": []}, self.receive)


async def test_bodies_are_charged_as_they_arrive_and_no_tenant_gets_all() -> None:
    reader = BodyReader(budget_bytes=8 * MAX_BODY_BYTES // 4)
    bodies = [Trickle(b"x" * (FREE_BYTES + MAX_BODY_BYTES // 2)) for _ in range(2)]

    async def hold(body: Trickle, tenant: str) -> int:
        async with reader.read(body.request(), tenant=tenant) as data:
            return len(data)

    tasks = [asyncio.create_task(hold(body, "greedy")) for body in bodies]
    await asyncio.sleep(0.01)
    with pytest.raises(SaturatedError):
        await hold(Trickle(b"x" * (FREE_BYTES + 1)), "greedy")
    other, small = Trickle(b"x" * (FREE_BYTES + 1)), Trickle(b"x" * FREE_BYTES)
    other.more.set()
    small.more.set()
    assert await hold(other, "other") == FREE_BYTES + 1
    assert await hold(small, "greedy") == FREE_BYTES
    for body in bodies:
        body.more.set()
    await asyncio.gather(*tasks)
    reader.check_integrity()


async def test_a_body_that_trickles_is_given_up() -> None:
    reader = BodyReader(grace_s=0.1)

    with pytest.raises(DeadlineError, match="too slowly"):
        async with reader.read(Trickle(b"x").request(), tenant="a"):
            pass
    reader.check_integrity()


async def test_a_client_that_goes_before_its_body_is_whole_is_no_fault_of_ours() -> None:
    reader = BodyReader()
    parts = [{"type": "http.request", "body": b"x", "more_body": True}]

    async def receive() -> dict[str, object]:
        return parts.pop() if parts else {"type": "http.disconnect"}

    with pytest.raises(CancelledRequestError, match="went away"):
        async with reader.read(Request({"type": "http", "method": "POST", "headers": []}, receive), tenant="a"):
            pass
    reader.check_integrity()


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health HTTP/1.1\r\nx-long: ",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx-trailer: ",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;extension=",
    ],
    ids=["header", "trailer", "extension of a chunk"],
)
async def test_what_is_no_body_has_a_longest_size(valkey_url: str, start: bytes) -> None:
    async with running_gateway(valkey_url) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
        writer.write(start)
        async with asyncio.timeout(20):
            with suppress(ConnectionError):
                for _ in range(64):
                    writer.write(b"x" * 16384)
                    await writer.drain()
                while await reader.read(65536):
                    pass
        writer.close()

        assert await complete(rig) == 200


UPGRADE = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


def request(body: bytes, *, version: str = "1.1", headers: str = "") -> bytes:
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "cut", [None, 40, -len(BODY), -5], ids=["whole", "in the header", "at the body", "in the body"]
)
async def test_a_request_that_would_rather_speak_http2_is_served_in_http1(valkey_url: str, cut: int | None) -> None:
    async with running_gateway(valkey_url) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
        data = request(BODY, headers=UPGRADE)
        writer.write(data[:cut])
        await asyncio.sleep(0.05)
        if cut is not None:
            writer.write(data[cut:])
        writer.write(request(BODY))
        async with asyncio.timeout(20):
            for _ in range(2):
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                assert head.startswith(b"http/1.1 200 ")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.close()


async def test_a_stream_to_a_client_of_http_1_0_is_not_cut_into_chunks(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
        writer.write(request(BODY[:-1] + b', "stream": true}', version="1.0"))
        async with asyncio.timeout(20):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()

        assert b"transfer-encoding" not in head.lower()
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_goes_is_missed_by_all_its_requests(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2
        _, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
        writer.write(request(BODY.replace(b"2}", b"9}")) + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        await rig.engine.wait_for(lambda: bool(rig.engine.submits))
        writer.close()
        await rig.engine.wait_for(lambda: bool(rig.engine.aborted_ids))
        rig.check_idle()
