"""An engine and an adapter store with only the protocol: for gateway tests that need slow, dying or flooding peers.

`EngineDouble` speaks `EngineService.Session` over real gRPC, registers in a real Valkey, and draws its tokens from a
function of the request, so that two doubles agree on how an output goes on. End-to-end tests use the real engine.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
from loraplex.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc, engine_pb2, engine_pb2_grpc, gateway_pb2
from loraplex_common.base_model import BaseModelInfo
from loraplex_common.error_status import to_status
from loraplex_common.errors import LoraplexError
from loraplex_common.registry import ENGINES_KEY, EngineRecord, engine_key
from loraplex_common.wake_up import WakeUp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

LEASE_S = 60.0

# What each request is said to have used that came to its end.
KV_PAGE_S = 1.5
ADAPTER_PAGE_S = 0.25


@dataclass(kw_only=True)
class _Running:
    """A request on the double."""

    submit: engine_pb2.Submit
    tokens: Sequence[int]
    position: int
    has_loaded: bool = False
    has_started: bool = False


@dataclass(kw_only=True)
class EngineDouble:
    """An engine without a model.

    Attributes:
        base: The base model it pretends to serve.
        reply: The whole output of a request, from its first token.
        refuse: If set, every request ends with this error instead.
        tokens_per_message: Tokens of each request in one message.
        hold_at: Requests stop at this position until `release` is called; None never holds.
        resident: Digests that it reports as on the device.
        loading_first: Report a load in progress before every start.
        poison: A request of that many prompt tokens ends the session that carries it, before any token.
        gives_up_at: Position -> the error with which a request ends there, in the message of the token before it.
        constrains: Whether its record says that it knows constraints.
        sums_adapters: Whether its record says that it adds up several adapters.
        numerics: What loading did to the base model's numbers, it says.
        is_silent: Send nothing any more but keep the connection, as a stopped process does.
        finish: Reason of the end after the reply's last token; a reply that ends in a stop token says so.
    """

    base: BaseModelInfo
    reply: Callable[[engine_pb2.Submit], Sequence[int]]
    refuse: LoraplexError | None = None
    tokens_per_message: int = 1
    hold_at: int | None = None
    resident: set[str] = field(default_factory=set)
    finish: gateway_pb2.FinishReason.ValueType = gateway_pb2.FINISH_REASON_LENGTH
    stop_token_id: int | None = None
    max_model_len: int = 512
    loading_first: bool = False
    poison: int | None = None
    gives_up_at: dict[int, LoraplexError] = field(default_factory=dict)
    is_silent: bool = False
    constrains: bool = True
    sums_adapters: bool = True
    numerics: str = "bf16"

    def __post_init__(self) -> None:
        self.engine_id = f"engine-{uuid.uuid4().hex[:8]}"
        self.port = 0
        self.submits: list[engine_pb2.Submit] = []
        self.aborted_ids: list[str] = []
        self.num_sessions = 0
        self.extra_load = 0
        self.further_load = engine_pb2.LoadReport()
        self.servicer = servicer_of(self)
        self._changed = WakeUp()
        self._released = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        """Listen; on a free port unless one is given."""
        self._server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self.servicer, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def register(self, valkey: Redis) -> None:
        """Enter the registry under a lease."""
        await valkey.set(engine_key(self.engine_id), self.record().to_json(), ex=int(LEASE_S))
        await valkey.zadd(ENGINES_KEY, {self.engine_id: time.time() + LEASE_S})

    async def unregister(self, valkey: Redis) -> None:
        """Leave the registry, as an engine that ends in good order does."""
        await valkey.zrem(ENGINES_KEY, self.engine_id)

    def record(self) -> EngineRecord:
        """Return its record in the registry."""
        return EngineRecord(
            engine_id=self.engine_id,
            target=f"127.0.0.1:{self.port}",
            base_model=self.base.name,
            base_fingerprint=self.base.fingerprint,
            max_model_len=self.max_model_len,
            vocab_size=self.base.vocab_size,
            num_pages=64,
            block_tokens=16,
            page_bytes=65536,
            max_image_pages=32,
            constrains=self.constrains,
            sums_adapters=self.sums_adapters,
            numerics=self.numerics,
        )

    async def kill(self) -> None:
        """End every stream at once, as a crash would."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def release(self) -> None:
        """Let held requests go on, and hold none from now on."""
        self.hold_at = None
        self._released.set()
        self.notify()

    def notify(self) -> None:
        """Wake up the tasks that wait for a change."""
        self._changed.notify()

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until a condition on this double holds."""
        async with asyncio.timeout(timeout_s):
            await self._changed.wait_until(condition)

    async def session(
        self, requests: AsyncIterator[engine_pb2.SessionRequest]
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        """Run one session."""
        self.num_sessions += 1
        running: dict[int, _Running] = {}
        outputs: list[engine_pb2.Output] = []
        reader = asyncio.create_task(self._read(requests, running, outputs))
        step = 0
        try:
            first = self._message(step, running, residency=True)
            first.welcome.engine_id, first.welcome.base_fingerprint = self.engine_id, self.base.fingerprint
            first.welcome.numerics = self.numerics
            yield first
            while True:
                changed = self._changed.next
                step += 1
                if any(len(r.submit.prompt_token_ids) == self.poison for r in running.values()):
                    raise RuntimeError("this request ends sessions")
                await self._changed.wait_until(lambda: not self.is_silent)
                message = self._step(step, running, outputs)
                if message is not None:
                    yield message
                    await asyncio.sleep(0)
                elif reader.done():
                    return
                else:
                    try:
                        async with asyncio.timeout(0.5):
                            await changed.wait()
                    except TimeoutError:
                        if not self.is_silent:
                            yield self._message(step, running, residency=False)
        finally:
            reader.cancel()

    async def _read(
        self,
        requests: AsyncIterator[engine_pb2.SessionRequest],
        running: dict[int, _Running],
        outputs: list[engine_pb2.Output],
    ) -> None:
        async for request in requests:
            for submit in request.submits:
                assert submit.slot not in running, "the gateway used a slot twice"
                self.submits.append(submit)
                if self.refuse is not None:
                    outputs.append(engine_pb2.Output(slot=submit.slot, error=to_status(self.refuse)))
                    continue
                tokens = list(self.reply(submit))[: submit.stopping.max_new_tokens]
                running[submit.slot] = _Running(submit=submit, tokens=tokens, position=len(submit.resumed_token_ids))
            for abort in request.aborts:
                gone = running.pop(abort.slot, None)
                if gone is not None:
                    self.aborted_ids.append(gone.submit.request_id)
                    outputs.append(_end(abort.slot, gateway_pb2.FINISH_REASON_CANCELLED, None))
            self.notify()

    def _step(
        self, step: int, running: dict[int, _Running], outputs: list[engine_pb2.Output]
    ) -> engine_pb2.SessionResponse | None:
        message = self._message(step, running, residency=False)
        message.outputs.extend(outputs)
        outputs.clear()
        for slot, request in list(running.items()):
            self._advance(message, slot, request)
            if error := self.gives_up_at.get(request.position):
                message.outputs.append(engine_pb2.Output(slot=slot, error=to_status(error)))
                del running[slot]
            elif request.position >= len(request.tokens):
                message.outputs.append(_end(slot, self.finish, self.stop_token_id))
                del running[slot]
        self.notify() if message.token_ids or message.outputs else None
        return message if message.token_ids or message.outputs else None

    def _advance(self, message: engine_pb2.SessionResponse, slot: int, request: _Running) -> None:
        if self.loading_first and not request.has_loaded:
            request.has_loaded = True
            loading = gateway_pb2.AdapterLoading(bytes_done=50, bytes_total=100, tier=adapter_pb2.TIER_STORE)
            message.outputs.append(engine_pb2.Output(slot=slot, loading=loading))
            return
        if not request.has_started:
            request.has_started = True
            started = engine_pb2.EngineStarted(cached_tokens=0)
            message.outputs.append(engine_pb2.Output(slot=slot, started=started))
        stop = len(request.tokens) if self.hold_at is None else min(self.hold_at, len(request.tokens))
        stop = min(stop, request.position + self.tokens_per_message)
        for position in range(request.position, stop):
            self._emit(message, slot, position, request)
        request.position = max(request.position, stop)

    def _emit(self, message: engine_pb2.SessionResponse, slot: int, position: int, request: _Running) -> None:
        token_id = request.tokens[position]
        if not request.submit.HasField("logprobs"):
            message.token_slots.append(slot)
            message.token_sequences.append(position)
            message.token_ids.append(token_id)
            return
        top = [
            gateway_pb2.TokenLogprob(token_id=token_id + n, logprob=-0.5 - n) for n in range(request.submit.logprobs)
        ]
        chosen = gateway_pb2.TokenLogprob(token_id=token_id, logprob=-0.5)
        logprobs = [gateway_pb2.PositionLogprobs(chosen=chosen, top=top)]
        message.outputs.append(engine_pb2.Output(slot=slot, sequence=position, token_ids=[token_id], logprobs=logprobs))

    def _message(self, step: int, running: dict[int, _Running], *, residency: bool) -> engine_pb2.SessionResponse:
        load = engine_pb2.LoadReport(sequence=step, running=len(running) + self.extra_load)
        load.MergeFrom(self.further_load)
        message = engine_pb2.SessionResponse(step=step, load=load)
        if residency:
            message.residency.snapshot = True
            message.residency.added.extend(sorted(self.resident))
        return message


def _end(slot: int, reason: gateway_pb2.FinishReason.ValueType, stop_token_id: int | None) -> engine_pb2.Output:
    finish = engine_pb2.EngineFinish(finish_reason=reason, stop_token_id=stop_token_id)
    usage = engine_pb2.EngineUsage(kv_page_seconds=KV_PAGE_S, adapter_page_seconds=ADAPTER_PAGE_S)
    return engine_pb2.Output(slot=slot, finish=finish, usage=usage)


class SessionServicer(engine_pb2_grpc.EngineServiceServicer):
    """Serves sessions of a double."""

    def __init__(self, engine: EngineDouble) -> None:
        self._engine = engine

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[engine_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        async for response in self._engine.session(request_iterator):
            yield response


def servicer_of(engine: EngineDouble) -> engine_pb2_grpc.EngineServiceServicer:
    """Return its servicer for a test's own server, for a double behind TLS and keys."""
    return SessionServicer(engine)  # type: ignore[abstract]  # it only serves sessions


class StoreDouble(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """The two calls of an adapter store that a gateway makes."""

    def __init__(self) -> None:
        self.entries: dict[str, adapter_store_pb2.WatchAliasesResponse.Entry] = {}
        self.prefetched: list[tuple[str, str]] = []
        self.authorizations: set[str] = set()
        self.port = 0
        self._sequence = 0
        self._watchers: list[asyncio.Queue[adapter_store_pb2.WatchAliasesResponse.Entry]] = []
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        """Listen."""
        self._server = grpc.aio.server()
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def kill(self) -> None:
        """End every stream at once."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def put(
        self,
        name: str,
        revisions: dict[str, str],
        *,
        fingerprint: str,
        allowed: Sequence[str] = (),
        num_bytes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Publish a name whose labels point at digests."""
        entry = adapter_store_pb2.WatchAliasesResponse.Entry(
            name=name,
            aliases=[adapter_pb2.Alias(name=name, label=label, revision=d) for label, d in revisions.items()],
            revisions=[
                adapter_pb2.AdapterRevision(
                    revision=digest,
                    name=name,
                    base_fingerprint=fingerprint,
                    canonical_bytes=num_bytes.get(digest, 0),
                )
                for digest in dict.fromkeys(revisions.values())
            ],
            allowed_tenants=allowed,
        )
        self.entries[name] = entry
        for watcher in self._watchers:
            watcher.put_nowait(entry)

    async def WatchAliases(  # noqa: N802
        self, request: adapter_store_pb2.WatchAliasesRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.WatchAliasesResponse]:
        """Stream the whole table, then every change."""
        self.authorizations |= {value for key, value in context.invocation_metadata() if key == "authorization"}
        queue: asyncio.Queue[adapter_store_pb2.WatchAliasesResponse.Entry] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            yield adapter_store_pb2.WatchAliasesResponse(
                sequence=1, entries=self.entries.values(), snapshot_start=True, snapshot_end=True
            )
            while True:
                entry = await queue.get()
                self._sequence += 1
                yield adapter_store_pb2.WatchAliasesResponse(sequence=self._sequence, entries=[entry])
        finally:
            self._watchers.remove(queue)

    async def PrefetchAdapter(  # noqa: N802
        self, request: adapter_store_pb2.PrefetchAdapterRequest, context: Any
    ) -> adapter_store_pb2.PrefetchAdapterResponse:
        """Take a hint."""
        self.prefetched.append((request.revision, request.engine_id))
        return adapter_store_pb2.PrefetchAdapterResponse()
