"""A gateway's end of an engine session, for tests that connect to an engine directly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import status_pb2
from loraplex.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2
from loraplex_common.error_status import from_status
from loraplex_common.grpc_channel import open_channel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from loraplex_common.errors import LoraplexError

FinishReason = gateway_pb2.FinishReason


@dataclass(slots=True)
class Outcome:
    """The outcome of one request so far.

    Attributes:
        first_sequence: Position of the first token that arrived.
        error: Status of the request, if it failed.
    """

    token_ids: list[int] = field(default_factory=list)
    first_sequence: int | None = None
    logprobs: list[gateway_pb2.PositionLogprobs] = field(default_factory=list)
    started: engine_pb2.EngineStarted | None = None
    finish: engine_pb2.EngineFinish | None = None
    error: status_pb2.Status | None = None
    num_ends: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    has_tokens: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def failure(self) -> LoraplexError:
        """The error that the request ended with."""
        assert self.error is not None, f"did not fail: {self}"
        return from_status(self.error)

    def add_tokens(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Append tokens, which must continue where the others ended."""
        if self.first_sequence is None:
            self.first_sequence = sequence
        assert sequence == self.first_sequence + len(self.token_ids), f"token {sequence} after {self}"
        assert self.num_ends == 0, f"tokens after the end of {self}"
        self.token_ids.extend(token_ids)
        if token_ids:
            self.has_tokens.set()


def make_submit(slot: int, prompt: Sequence[int], max_new_tokens: int, **fields: Any) -> engine_pb2.Submit:
    """Return a greedy request that runs to its length; ``fields`` replace the defaults."""
    defaults: dict[str, Any] = {
        "request_id": f"r-{slot}",
        "slot": slot,
        "prompt_token_ids": prompt,
        "sampling": gateway_pb2.SamplingParams(temperature=0.0, seed=0),
        "stopping": gateway_pb2.StoppingParams(max_new_tokens=max_new_tokens, ignore_eos=True),
    }
    return engine_pb2.Submit(**(defaults | fields))


class EngineSessionClient:
    """A session; use it as an async context manager.

    Attributes:
        outcomes: Outcomes by slot.
        resident: Digests on the device, kept up to date from the deltas.
        loads: All load reports so far.
    """

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self._call: grpc.aio.StreamStreamCall[Any, Any] = engine_pb2_grpc.EngineServiceStub(self._channel).Session()
        self.outcomes: dict[int, Outcome] = {}
        self.resident: set[str] = set()
        self.loads: list[engine_pb2.LoadReport] = []
        self.num_messages = 0
        self.failure: grpc.aio.AioRpcError | None = None
        self._reader: asyncio.Task[None] | None = None
        self.is_over = asyncio.Event()
        self._write_lock = asyncio.Lock()

    async def __aenter__(self) -> EngineSessionClient:
        await self.send(engine_pb2.SessionRequest(hello=engine_pb2.SessionRequest.Hello(gateway_id="test")))
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            if not self._reader.cancelled():
                self._reader.result()
        await self._channel.close()

    async def send(self, request: engine_pb2.SessionRequest) -> None:
        """Write a raw message."""
        async with self._write_lock:  # grpc.aio breaks a call with two concurrent writes
            await self._call.write(request)

    async def submit(self, slot: int, prompt: Sequence[int], max_new_tokens: int = 8, **fields: Any) -> Outcome:
        """Submit a greedy request; ``fields`` are those of `Submit`, and replace the defaults."""
        outcome = self.outcomes[slot] = Outcome()
        submit = make_submit(slot, prompt, max_new_tokens, **fields)
        await self.send(engine_pb2.SessionRequest(submits=[submit]))
        return outcome

    async def submit_many(self, slots: Sequence[int], prompt: Sequence[int], max_new_tokens: int) -> list[Outcome]:
        """Submit one greedy request per slot, all in one message."""
        outcomes = [Outcome() for _ in slots]
        self.outcomes.update(zip(slots, outcomes, strict=True))
        submits = [make_submit(slot, prompt, max_new_tokens) for slot in slots]
        await self.send(engine_pb2.SessionRequest(submits=submits))
        return outcomes

    async def abort(self, slot: int) -> None:
        """Ask for a request's end."""
        await self.send(engine_pb2.SessionRequest(aborts=[engine_pb2.Abort(slot=slot)]))

    async def finish(self, outcome: Outcome, timeout_s: float = 30.0) -> list[int]:
        """Wait for a request's normal end and return its tokens."""
        await self._end_of(outcome, timeout_s)
        assert outcome.error is None, f"request failed: {outcome.error}"
        return outcome.token_ids

    async def fail(self, outcome: Outcome, timeout_s: float = 30.0) -> LoraplexError:
        """Wait for a request's failure and return it."""
        await self._end_of(outcome, timeout_s)
        return outcome.failure

    async def close_input(self) -> None:
        """Close the input: no more requests come."""
        await self._call.done_writing()

    async def _end_of(self, outcome: Outcome, timeout_s: float) -> None:
        waiters = [asyncio.create_task(event.wait()) for event in (outcome.ended, self.is_over)]
        await asyncio.wait(waiters, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
        assert outcome.ended.is_set(), f"no end after {timeout_s} s; session: {self.failure}"

    async def _read(self) -> None:
        try:
            async for message in self._call:
                self.num_messages += 1
                self._take(message)
        except grpc.aio.AioRpcError as error:
            self.failure = error
        except asyncio.CancelledError:
            pass  # the call was cancelled by __aexit__
        finally:
            self.is_over.set()

    def _take(self, message: engine_pb2.SessionResponse) -> None:
        if message.residency.snapshot:
            self.resident.clear()
        self.resident.update(message.residency.added)
        self.resident.difference_update(message.residency.removed)
        self.loads.append(message.load)
        columns = zip(message.token_slots, message.token_sequences, message.token_ids, strict=True)
        for slot, sequence, token_id in columns:
            self.outcomes[slot].add_tokens(sequence, [token_id])
        for output in message.outputs:
            self._take_output(output)

    def _take_output(self, output: engine_pb2.Output) -> None:
        outcome = self.outcomes[output.slot]
        if output.HasField("started"):
            assert outcome.started is None, "started twice"
            outcome.started = output.started
        if output.token_ids:
            outcome.add_tokens(output.sequence, output.token_ids)
            outcome.logprobs.extend(output.logprobs)
        if output.WhichOneof("end") is not None:
            outcome.num_ends += 1
            assert outcome.num_ends == 1, f"ended twice: {outcome}"
            outcome.finish = output.finish if output.HasField("finish") else None
            outcome.error = output.error if output.HasField("error") else None
            outcome.ended.set()
