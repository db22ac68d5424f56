"""Tokens take a short way to clients that read, and a long one to those that do not: the output is the same."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from support.gateway_rig import MODEL_NAME, running_gateway, text_request
from support.streams import rest
from support.waiting import eventually

if TYPE_CHECKING:
    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration
NUM_TOKENS = 300
LONG = gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS)
MANY_TOKENS = 60_000


def request_of(body: dict[str, Any]) -> bytes:
    data = json.dumps({"model": MODEL_NAME, "prompt": "the quick", "stream": True, **body}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


def texts_of(stream: bytes) -> list[str]:
    """Return the text of each event that has some."""
    events = [json.loads(data) for data in re.findall(rb"data: (\{.*\})\n\n", stream)]
    return [text for event in events for choice in event["choices"] if (text := choice["text"])]


async def expected_text(rig: Rig, num_tokens: int) -> str:
    stopping = gateway_pb2.StoppingParams(max_new_tokens=num_tokens)
    once = gateway_pb2.GenerateOnceRequest(request=text_request(stopping=stopping))
    return (await rig.stub.GenerateOnce(once)).text


async def test_a_grpc_stream_has_every_token_once_in_order(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        events: list[Any] = await rest(rig.stub.Generate(text_request(stopping=LONG)))
        chunks = [event.chunk for event in events if event.HasField("chunk")]
        once = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(stopping=LONG)))

        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == list(once.token_ids)
        assert "".join(chunk.text for chunk in chunks) == once.text
        assert events[-1].finished.usage.output_tokens == len(once.token_ids) == NUM_TOKENS
        rig.check_idle()


async def test_choices_side_by_side_have_each_their_own_text(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(timeout=30) as client:
        body = {"model": MODEL_NAME, "prompt": "the quick", "max_tokens": NUM_TOKENS, "n": 3, "stream": True}
        answer = await client.post(f"{rig.http}/v1/completions", json=body)
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == n) for n in range(3)]

        assert texts == [await expected_text(rig, NUM_TOKENS)] * 3
        assert answer.text.endswith("data: [DONE]\n\n")
        rig.check_idle()


async def test_the_tokens_of_a_client_that_does_not_read_come_together(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_buffered_tokens=10**6) as rig:
        rig.engine.max_model_len, rig.engine.tokens_per_message = 200_000, 100
        await rig.engine.register(rig.valkey)
        await eventually(lambda: rig.app.pool.links[0].record.max_model_len == 200_000)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", rig.app.http_port))
        await loop.sock_sendall(connection, request_of({"max_tokens": MANY_TOKENS}))
        await rig.engine.wait_for(lambda: bool(rig.engine.submits))
        await eventually(lambda: rig.app.pool.links[0].num_in_flight == 0)  # the engine has said it all

        stream = b""
        while b"data: [DONE]" not in stream:
            stream += await loop.sock_recv(connection, 1 << 20)
        connection.close()

        texts = texts_of(re.sub(rb"\r\n[0-9a-f]+\r\n", b"", stream))
        assert len(texts) < MANY_TOKENS / 2
        assert max(map(len, texts)) > 100
        assert "".join(texts) == await expected_text(rig, MANY_TOKENS)


async def test_clients_that_vanish_in_the_middle_of_a_write_are_cancelled_and_no_error(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.max_model_len = 200_000
        await rig.engine.register(rig.valkey)
        await eventually(lambda: rig.app.pool.links[0].record.max_model_len == 200_000)
        stopping = gateway_pb2.StoppingParams(max_new_tokens=MANY_TOKENS)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.grpc_port}")
        calls = [
            gateway_pb2_grpc.GatewayServiceStub(channel).Generate(text_request(stopping=stopping)) for _ in range(32)
        ]
        for call in calls:
            for _ in range(4):
                await call.read()

        await channel.close(None)
        await eventually(lambda: rig.app.claims.num_running == 0)

        async with httpx.AsyncClient(timeout=30) as client:
            page = (await client.get(rig.metrics)).text
        statuses = set(re.findall(r'GatewayService/Generate",grpc_status="(\w+)"', page))
        codes = set(re.findall(r'loraplex_gateway_requests_total\{.*code="(\w+)"', page))
        assert (statuses, codes) == ({"CANCELLED"}, {"CANCELLED"})
        rig.check_idle()
