"""What comes over a connection that is no plain request: bounded, refused by name, and told in the order of the requests."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from loraplex_gateway.openai.body_reader import MAX_BODY_BYTES
from loraplex_gateway.openai.http_protocol import MAX_HEADER_BYTES, MAX_HELD_BYTES, SLICE_BYTES, BoundedProtocol
from support.gateway_rig import MODEL_NAME, running_gateway
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration
BODY = json.dumps({"model": MODEL_NAME, "prompt": "the quick", "max_tokens": 2}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
READ_BYTES = 256 * 1024  # asyncio's, at one go


def post(headers: str = "", body: bytes = BODY, *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n"
    return head.encode() + body


def in_chunks(coding: str, body: bytes = BODY) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: {coding}\r\n\r\n"
    return b"%b%x\r\n%b\r\n0\r\n\r\n" % (head.encode(), len(body), body)


class Connection:
    """A connection to the HTTP port, written to in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Return status, header and body of the next answer."""
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return int(head.split()[1]), head.lower(), await self.reader.readexactly(length)

    async def has_ended(self) -> bool:
        """Return whether the server closes the connection without another byte."""
        async with asyncio.timeout(20):
            return await self.reader.read() == b""


@asynccontextmanager
async def connected(rig: Rig, data: bytes = b"") -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port)
    writer.write(data)
    yield Connection(reader, writer)
    writer.close()


async def told(rig: Rig, data: bytes) -> tuple[int, str]:
    """Return the status of the first answer on a connection of its own, and the error's message."""
    async with connected(rig, data) as connection:
        status, _, body = await connection.answer()
    return status, json.loads(body).get("error", {}).get("message", "")


def header_of(num_bytes: int) -> bytes:
    """Return a whole request whose header has so many bytes."""
    lines = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    filler = b"x-filler: %b\r\n" % (b"a" * 1000)
    while len(lines) + len(filler) + 20 < num_bytes:
        lines += filler
    return lines + b"x-last: %b\r\n\r\n" % (b"a" * (num_bytes - len(lines) - 12))


async def test_a_header_has_a_longest_size_however_it_arrives(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        assert (await told(rig, header_of(MAX_HEADER_BYTES - 4096)))[0] == 200
        for num_bytes in (70_000, 200_000):
            status, message = await told(rig, header_of(num_bytes))
            assert (status, str(MAX_HEADER_BYTES) in message) == (431, True)
        # Behind another request, too.
        async with connected(rig, HEALTH + header_of(70_000)) as connection:
            assert [(await connection.answer())[0] for _ in range(2)] == [200, 431]


async def test_a_body_in_a_coding_that_is_not_served_is_refused_by_name(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for coding in ("gzip, chunked", "gzip\r\ntransfer-encoding: chunked", "gzip"):
            status, message = await told(rig, in_chunks(coding))
            assert (status, "Transfer-Encoding" in message, "as it is" in message) == (501, True, True), coding
        for encoding in ("gzip", "br", "identity\r\ncontent-encoding: gzip", "GZIP, identity"):
            status, message = await told(rig, post(f"content-encoding: {encoding}\r\n", b"\x1f\x8b\x08"))
            assert (status, "Content-Encoding" in message, "as it is" in message) == (415, True, True), encoding
        for plain in (post("content-encoding: identity\r\n"), in_chunks("chunked"), in_chunks("Chunked")):
            assert (await told(rig, plain))[0] == 200


async def test_a_client_that_asks_first_is_not_told_to_send_what_is_too_long(valkey_url: str) -> None:
    expects = "expect: 100-continue\r\n"
    async with running_gateway(valkey_url) as rig:
        async with connected(rig, post(expects, b"", length=MAX_BODY_BYTES + 1)) as connection:
            status, head, body = await connection.answer()
            assert (status, str(MAX_BODY_BYTES) in body.decode()) == (413, True)
            # The client may send its body or not: nothing that follows can be told from it.
            assert b"connection: close" in head
            assert await connection.has_ended()
        async with connected(rig, post(expects, b"", length=len(BODY))) as connection:
            assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.writer.write(BODY + HEALTH)
            first, second = await connection.answer(), await connection.answer()
            assert (first[0], second[0]) == (200, 200)


async def test_what_is_no_http_is_told_behind_the_answers_to_requests_before_it(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 1
        async with connected(rig, post() + HEALTH + b"NO SUCH THING\r\n\r\n") as connection:
            await rig.engine.wait_for(lambda: bool(rig.engine.submits))
            connection.writer.write(HEALTH)  # nothing is served behind it
            rig.engine.release()
            assert [(await connection.answer())[0] for _ in range(3)] == [200, 200, 400]
            assert await connection.has_ended()


IMPOSSIBLE = "poet%0a poet:latest%0a poet%0d%0aset-cookie:%20a a%00b %1b[31m %ff%fe poet%20 poet/ %2e%2e/poet poet@%0a"


async def test_a_name_that_nothing_can_have_is_not_found_and_not_repeated_raw(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, connected(rig) as connection:
        for name in (*IMPOSSIBLE.split(), "tiny%7cpoet%0a"):
            connection.writer.write(b"GET /v1/models/%b HTTP/1.1\r\n\r\n" % name.encode())
            status, head, body = await connection.answer()
            error = json.loads(body)["error"]
            assert (status, error["code"], error["param"]) == (404, "model_not_found", "model"), name
            assert b"set-cookie" not in head
            assert [letter for letter in error["message"] if not letter.isprintable()] == []


async def test_a_line_break_behind_a_path_is_another_path(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for path in ("/health", "/v1/models", "/v1/completions", "/metrics"):
            status, message = await told(rig, b"GET %b%%0a HTTP/1.1\r\n\r\n" % path.encode())
            assert (status, f"{path}%0a" in message) == (404, True)


def held_and_parsed() -> tuple[int, int]:
    """Return the most bytes that a connection holds, and the requests in memory that have not been answered."""
    known = gc.get_objects()
    held = [len(each._held) for each in known if isinstance(each, BoundedProtocol)]
    waiting = [each for each in known if isinstance(each, RequestResponseCycle) and not each.response_complete]
    return max(held, default=0), len(waiting)


async def test_pipelined_requests_are_read_as_they_are_answered(valkey_url: str) -> None:
    num, short = 50_000, b"GET /healthz HTTP/1.1\r\n\r\n"
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 1
        async with connected(rig, post()) as connection:
            await rig.engine.wait_for(lambda: bool(rig.engine.submits))
            connection.writer.write(num * short)
            await asyncio.sleep(0.1)  # whatever is read, is read by then
            most = [held_and_parsed()]
            rig.engine.release()
            assert (await connection.answer())[0] == 200
            for _ in range(10):  # as long as the client reads, it goes on so
                assert [(await connection.answer())[0] for _ in range(200)] == [200] * 200
                most.append(held_and_parsed())

    assert max(held for held, _ in most) <= MAX_HELD_BYTES + READ_BYTES
    assert max(parsed for _, parsed in most) <= SLICE_BYTES // len(short) + 8


async def test_a_client_that_goes_is_missed_while_further_requests_of_it_wait(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 1
        async with connected(rig, post() + 100 * post()) as connection:
            await rig.engine.wait_for(lambda: bool(rig.engine.submits))
            connection.writer.close()
            await rig.engine.wait_for(lambda: bool(rig.engine.aborted_ids))
        assert len(rig.engine.submits) == 1
        rig.check_idle()
