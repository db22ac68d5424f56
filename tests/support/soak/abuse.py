"""Clients that misuse the fleet, beside clients that use it well."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
import httpx2
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from loraplex_client import AsyncClient
from loraplex_common.errors import LoraplexError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.soak.clients import DEADLINE_S
from support.soak.expectations import is_expected_of_generation
from support.soak.truth import MAX_TOKENS, STABLE, any_question

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable

    from support.soak.book import Book
    from support.soak.fleet import Fleet, Part
    from support.soak.truth import Truth

NUM_CUT: Final = 6
NUM_SLOW: Final = 4
SLOW_S: Final = 3.0
NUM_LARGE: Final = 6
LARGE_BYTES: Final = 4_000_000
NUM_IDLE: Final = 120  # far below what descriptors allow; more would keep other clients out
IDLE_S: Final = 2.0
NUM_TRICKLING: Final = 3
TRICKLE_S: Final = 4.0
TRICKLE_BYTES: Final = 512
BAD_BODIES: Final[tuple[tuple[bytes, int, str], ...]] = (
    (b"{", 400, "INVALID_PARAMETER"),
    (b"[" * 20_000, 400, "INVALID_PARAMETER"),
    (b'{"model": "tiny", "prompt": [9999999]}', 400, "INVALID_PARAMETER"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e9}', 400, "INVALID_PARAMETER"),
    (b'{"model": "tiny", "prompt": "a", "no_such_field": 1}', 400, "INVALID_PARAMETER"),
    (b'{"model": "nobody", "prompt": "a"}', 404, "ADAPTER_NOT_FOUND"),
)


class Abuse:
    """Ways to misuse gateways and stores from outside, by name; `kinds` has all of them."""

    def __init__(self, fleet: Fleet, truth: Truth, book: Book, rng: random.Random) -> None:
        self._fleet = fleet
        self._truth = truth
        self._book = book
        self._rng = rng

    def kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return the ways of misuse, by kind."""
        return {
            "slow readers": self.slow_readers,
            "cut streams": self.cut_streams,
            "malformed requests": self.malformed,
            "large bodies": self.large_bodies,
            "idle connections": self.idle_connections,
            "trickling uploads": self.trickling_uploads,
        }

    async def slow_readers(self) -> None:
        """Open streams, do not read them for a while, and then read them to their end."""

        async def read_late(client: AsyncClient) -> None:
            name = self._rng.choice(STABLE)
            question = any_question(self._rng, name)
            expected = self._truth.answer(self._truth.revisions[name], question)
            stream = client.generate(**question.options(), timeout=DEADLINE_S)
            await asyncio.sleep(SLOW_S)
            tokens = tuple([token async for event in stream for token in event.token_ids])
            self._book.counts["slow readers served"] += 1
            if tokens != expected:
                self._book.wrong(f"a slow reader got {tokens}, not {expected}")

        await self._each(NUM_SLOW, read_late)

    async def cut_streams(self) -> None:
        """Abandon streams in the middle."""

        async def leave(client: AsyncClient) -> None:
            options: dict[str, Any] = {"prompt_token_ids": [5, 6, 7], "max_new_tokens": MAX_TOKENS, "ignore_eos": True}
            wanted = self._rng.randint(1, 30)
            async with client.generate(adapter=self._rng.choice(STABLE), timeout=DEADLINE_S, **options) as stream:
                async for event in stream:
                    wanted -= len(event.token_ids)
                    if wanted <= 0:
                        break
            self._book.counts["streams cut"] += 1

        await self._each(NUM_CUT, leave)

    async def malformed(self) -> None:
        """Send invalid requests over both ports; each must be refused with its own reason."""
        gateway = self._rng.choice(self._fleet.gateways)
        async with httpx2.AsyncClient(timeout=DEADLINE_S) as http:
            for body, status, reason in BAD_BODIES:
                await self._expect(gateway, (status, reason), self._post(http, gateway, body))
        async with open_channel(gateway.grpc) as channel:
            call: Any = channel.unary_stream("/loraplex.v1.GatewayService/Generate")
            for garbage in (b"\xff" * 100, b"\x0f\x0f", b"\x1a\xff\xff\xff\xff\x07abc"):
                await self._expect(gateway, (0, "INVALID_PARAMETER"), self._read(call(garbage, timeout=DEADLINE_S)))

    async def large_bodies(self) -> None:
        """Send prompts of four megabytes at once over both ports; too long for the model, and refused as that."""
        gateway = self._rng.choice(self._fleet.gateways)
        body = json.dumps({"model": "tiny", "prompt": "a" * LARGE_BYTES, "max_tokens": 2}).encode()
        request = gateway_pb2.GenerateRequest(text="a " * (LARGE_BYTES // 2))
        wanted = (400, "CONTEXT_LENGTH_EXCEEDED")
        async with httpx2.AsyncClient(timeout=DEADLINE_S) as http, open_channel(gateway.grpc) as channel:
            # Connecting has 200 ms for a try, which encoding four megabytes here could use up.
            await asyncio.wait_for(channel.channel_ready(), DEADLINE_S)
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            posts = [self._expect(gateway, wanted, self._post(http, gateway, body)) for _ in range(NUM_LARGE)]
            calls = [
                self._expect(gateway, (0, wanted[1]), self._read(stub.Generate(request, timeout=DEADLINE_S)))
                for _ in range(NUM_LARGE)
            ]
            await asyncio.gather(*posts, *calls)

    async def idle_connections(self) -> None:
        """Open connections, send nothing, and close them."""
        addresses = [address for gateway in self._fleet.gateways for address in (gateway.grpc, gateway.http)]
        writers = []
        for address in addresses:
            host, _, port = address.rpartition(":")
            for _ in range(NUM_IDLE):
                try:
                    writers.append((await asyncio.open_connection(host, int(port)))[1])
                except OSError:
                    self._book.counts["connections refused"] += 1
        self._book.counts["idle connections"] += len(writers)
        await asyncio.sleep(IDLE_S)
        for writer in writers:
            writer.close()

    async def trickling_uploads(self) -> None:
        """Upload a few bytes at a time, and disappear."""
        store = self._rng.choice(self._fleet.stores)
        async with open_channel(store.grpc) as channel:
            stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            calls = [stub.UploadAdapter(self._trickle()) for _ in range(NUM_TRICKLING)]
            await asyncio.sleep(TRICKLE_S)
            for call in calls:
                call.cancel()
        self._book.counts["uploads that trickled"] += len(calls)

    async def _trickle(self) -> AsyncIterator[adapter_store_pb2.UploadAdapterRequest]:
        file = adapter_store_pb2.UploadAdapterRequest.File
        announced = [
            file(name="adapter_config.json", num_bytes=100, sha256="0" * 64),
            file(name="adapter_model.safetensors", num_bytes=2**20, sha256="0" * 64),
        ]
        header = adapter_store_pb2.UploadAdapterRequest.Header(name="trickle", files=announced)
        yield adapter_store_pb2.UploadAdapterRequest(header=header)
        while True:
            yield adapter_store_pb2.UploadAdapterRequest(data=b"x" * TRICKLE_BYTES)
            await asyncio.sleep(0.25)

    async def _each(self, num: int, do: Callable[[AsyncClient], Awaitable[None]]) -> None:
        """Do something on many connections at once; refusals because of a concurrent fault are not judged here."""
        began_s = time.monotonic()

        async def on_its_own() -> None:
            gateway = self._rng.choice(self._fleet.gateways)
            async with AsyncClient(gateway.grpc) as client:
                try:
                    await do(client)
                except LoraplexError as error:
                    self._judge("a client", gateway, error.reason, began_s, str(error))

        await asyncio.gather(*(on_its_own() for _ in range(num)))

    async def _expect(self, gateway: Part, wanted: tuple[int, str], answer: Awaitable[tuple[int, str, str]]) -> None:
        began_s = time.monotonic()
        try:
            status, reason, message = await answer
        except httpx2.HTTPError as error:
            status, reason, message = wanted[0], "UNAVAILABLE", repr(error)
        self._book.counts[f"refused: {reason}"] += 1
        if (status, reason) != wanted:
            self._judge(f"{wanted} expected, {status}", gateway, reason, began_s, message)

    def _judge(self, what: str, gateway: Part, reason: str, began_s: float, message: str) -> None:
        disturbers = self._book.disturbers(began_s, time.monotonic())
        if not is_expected_of_generation(reason, disturbers):
            self._book.wrong(f"{what}: {reason} through {gateway.name}: {message}; {sorted(disturbers)}")

    async def _post(self, http: httpx2.AsyncClient, gateway: Part, body: bytes) -> tuple[int, str, str]:
        answer = await http.post(f"http://{gateway.http}/v1/completions", content=body)
        error: dict[str, Any] = answer.json().get("error", {})
        return answer.status_code, str(error.get("reason")), str(error.get("message"))[:200]

    async def _read(self, call: Any) -> tuple[int, str, str]:
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            found = error_from_rpc(error)
            return 0, found.reason, found.message[:200]
        return 0, "OK", "it was answered"
