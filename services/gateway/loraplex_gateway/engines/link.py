"""The one stream between this gateway and one engine: submissions and aborts up, one message per step down."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.kept_status import KeptStatus
from loraplex_common.log import get_logger
from loraplex_common.reconnect import keep_connected

from loraplex_gateway.engines import wire
from loraplex_gateway.engines.link_state import TRANSITIONS, LinkState
from loraplex_gateway.engines.liveness import Liveness
from loraplex_gateway.engines.outgoing import Outgoing
from loraplex_gateway.engines.silence import MAX_MISSED, QUIET_SHARE, SILENCE_S, wait_for_silence
from loraplex_gateway.engines.slots import Slots
from loraplex_gateway.engines.ticket import EngineLostError, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.registry import EngineRecord

    from loraplex_gateway.engines.wire import Submission
    from loraplex_gateway.usage.account import UsageAccount

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
# Codes of an engine that answers, and will answer the same again until an operator mends the credentials.
REFUSALS: Final = ("UNAUTHENTICATED", "PERMISSION_DENIED")

_log = get_logger()


class EngineLink:
    """Connects to one engine, again and again, until closed.

    Args:
        record: The engine as it registered itself.
        gateway_id: Said in the hello.
        max_buffered_tokens: Bound of each request's buffer.
        silence_s: Without any message for so long, an engine is lost, connection or not; longer where it promises less.
        on_change: Called whenever the engine becomes or ceases to be a candidate.
        dial: Opens a channel to an engine's address.
    """

    def __init__(
        self,
        record: EngineRecord,
        *,
        gateway_id: str,
        max_buffered_tokens: int,
        on_change: Callable[[], None],
        silence_s: float = SILENCE_S,
        dial: Callable[[str], grpc.aio.Channel] = open_channel,
    ) -> None:
        self._dial, self._refusal = dial, ""
        self.record = record
        self.resident: set[str] = set()
        self.state = LinkState.CONNECTING
        self._gateway_id, self._max_buffered_tokens = gateway_id, max_buffered_tokens
        self._on_change = on_change
        self._least_silence_s = self._silence_s = silence_s
        self._num_messages = 0
        self._heard_at = time.monotonic()
        self._load = engine_pb2.LoadReport()
        self._in_flight_at_report = 0
        self._liveness = Liveness(time.monotonic)
        self._slots, self._outgoing = Slots(), Outgoing()

    @property
    def engine_id(self) -> str:
        """The engine's id."""
        return self.record.engine_id

    @property
    def num_in_flight(self) -> int:
        """Requests of this gateway on the engine."""
        return len(self._slots.tickets)

    @property
    def is_candidate(self) -> bool:
        """Whether new requests may go here."""
        return self.state is LinkState.OPEN and not self.record.is_draining and not self._load.draining

    @property
    def is_proven(self) -> bool:
        """Whether the engine shows on this session that it lives, whatever the registry says."""
        return self.state is LinkState.OPEN and self._liveness.is_proven

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has been heard for a while, though not for so long that the engine is lost."""
        return time.monotonic() - self._heard_at > self._silence_s * QUIET_SHARE

    @property
    def load(self) -> int:
        """Requests running and waiting on the engine: its last report, corrected by what we did since."""
        return max(
            self.num_in_flight,
            self._load.running + self._load.waiting + self.num_in_flight - self._in_flight_at_report,
        )

    @property
    def report(self) -> engine_pb2.LoadReport:
        """The engine's last report of its load; all zero without a connection."""
        return self._load

    @property
    def digests_in_flight(self) -> frozenset[str]:
        """Adapters of this gateway's requests on the engine."""
        return self._slots.digests

    def holds(self, digest: str) -> bool:
        """Whether the engine holds an adapter or is getting it for another of our requests."""
        return digest in self.resident or self._slots.uses(digest)

    def submit(self, submission: Submission, account: UsageAccount | None = None) -> Ticket:
        """Queue a request for the next message to the engine, which reports to its account.

        Raises:
            EngineLostError: If the session is not open.
        """
        if self.state is not LinkState.OPEN:
            raise EngineLostError(f"no session with engine {self.engine_id}", had_request=False)
        ticket = self._slots.take(
            submission.adapter_digests,
            lambda slot: Ticket(
                slot,
                next_sequence=len(submission.resumed_ids),
                max_buffered_tokens=self._max_buffered_tokens,
                on_overflow=self.release,
            ),
            account.attempt() if account is not None else None,
        )
        self._outgoing.submit(wire.to_submit(submission, ticket.slot))
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Take back a ticket; a request that has not ended is aborted with the next message. Safe to call twice."""
        slot = ticket.slot
        if self._slots.tickets.get(slot) is not ticket:
            return
        is_known = not self._outgoing.withdraw(slot)
        self._slots.release(slot, is_known=is_known)
        if is_known:
            self._outgoing.abort(slot)

    async def run(self) -> None:
        """Keep the session up until cancelled."""
        try:
            await keep_connected(self._hold_one, first_pause_s=FIRST_BACKOFF_S, max_pause_s=MAX_BACKOFF_S)
        finally:
            self._reset("the gateway closed the session", is_ours=True)
            self._move(LinkState.CLOSED)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if slots are lost or used twice."""
        self._slots.check_integrity()

    async def _hold_one(self) -> bool:
        """Run one connection to its end; return whether the engine took requests on it."""
        cause = await self._connect_once()
        was_open = self.state is LinkState.OPEN
        self._reset(cause)
        if was_open:
            _log.warning("lost the session with an engine", engine_id=self.engine_id, cause=cause)
        elif cause != self._refusal and cause.startswith(REFUSALS):
            _log.error("an engine does not let this gateway in", engine_id=self.engine_id, cause=cause)
        self._refusal = cause
        return was_open

    async def _connect_once(self) -> str:
        """Run one connection to its end and return why it ended; what arrives on it later is never read."""
        async with self._dial(self.record.target) as channel:
            call = engine_pb2_grpc.EngineServiceStub(channel).Session()
            writer = asyncio.create_task(self._write(call), name=f"session-writer-{self.engine_id}")
            reader = asyncio.create_task(self._read(call), name=f"session-reader-{self.engine_id}")
            listener = asyncio.create_task(self._listen(), name=f"session-listener-{self.engine_id}")
            try:
                await asyncio.wait({reader, listener}, return_when=asyncio.FIRST_COMPLETED)
                return reader.result() if reader.done() else listener.result()
            finally:
                for task in (writer, reader, listener):
                    task.cancel()
                await asyncio.gather(writer, reader, listener, return_exceptions=True)
                call.cancel()
                with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    await call.done_writing()  # with a key, grpc.aio leaves its reader of our writes waiting

    async def _read(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> str:
        """Take in all that the engine says; return why it says no more."""
        kept = KeptStatus(call)  # an engine refuses while the first message is on its way to it
        try:
            async for message in call:
                self._num_messages += 1
                self._heard_at = time.monotonic()
                self._receive(message)
        except grpc.aio.AioRpcError as error:
            status = kept.behind(error)
            return f"{status.code().name}: {status.details()}"
        except wire.WrongEngineError as error:
            _log.warning("another engine is where one was", engine_id=self.engine_id, cause=str(error))
            return str(error)
        except ValueError as error:
            # What it says cannot be trusted any more, whichever request it is about.
            _log.error("an engine broke the protocol", engine_id=self.engine_id, exc_info=error)
            return f"the engine broke the protocol: {error}"
        return "the engine closed the stream"

    async def _listen(self) -> str:
        """Return once an engine that has answered is silent: stopped, or hung as a whole, it keeps its connection."""
        silent_s = await wait_for_silence(
            lambda: self._num_messages, lambda: self._silence_s if self.state is LinkState.OPEN else math.inf
        )
        return f"the engine has said nothing for {silent_s:.1f} s"

    async def _write(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Send everything that has gathered; while a write is pending the next batch grows."""
        try:
            hello = engine_pb2.SessionRequest.Hello(gateway_id=self._gateway_id)
            await call.write(engine_pb2.SessionRequest(hello=hello))
            while True:
                await self._outgoing.wait()
                if request := self._outgoing.next_batch():
                    await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()  # the reader learns the cause

    def _receive(self, message: engine_pb2.SessionResponse) -> None:
        if self.state is LinkState.CONNECTING:
            wire.check_welcome(message.welcome, self.record)
            promised_s = wire.from_duration(message.welcome.max_silence)
            self._silence_s = max(self._least_silence_s, MAX_MISSED * promised_s)
        self._liveness.hear(message, has_work=bool(self._slots.tickets))
        if message.HasField("residency"):
            self._update_residency(message.residency)
        tickets = self._slots.tickets
        for slot, sequence, token_id in zip(
            message.token_slots, message.token_sequences, message.token_ids, strict=True
        ):
            if slot in tickets:  # the last tokens of an aborted request have no reader
                tickets[slot].push_token(sequence, token_id)
        for output in message.outputs:
            self._receive_output(output)
        if message.HasField("load"):
            was_draining = self._load.draining
            self._load = message.load
            self._in_flight_at_report = len(tickets)
            if was_draining != self._load.draining:
                self._on_change()
        if self.state is LinkState.CONNECTING:
            self._move(LinkState.OPEN)

    def _receive_output(self, output: engine_pb2.Output) -> None:
        end = wire.end(output)
        ticket = self._slots.tickets.get(output.slot)
        if ticket is not None:
            ticket.push_output(
                sequence=output.sequence,
                token_ids=output.token_ids,
                logprobs=output.logprobs,
                started=wire.started(output.started) if output.HasField("started") else None,
                loading=wire.loading(output.loading) if output.HasField("loading") else None,
                end=end,
            )
        if end is not None and self._slots.ended(output.slot, wire.used(output)):
            self._outgoing.forget_abort(output.slot)

    def _update_residency(self, delta: engine_pb2.ResidencyDelta) -> None:
        if delta.snapshot:
            self.resident.clear()
        self.resident.update(delta.added)
        self.resident.difference_update(delta.removed)

    def _reset(self, cause: str, *, is_ours: bool = False) -> None:
        """Forget the connection: whatever was in flight is lost to its owners."""
        tickets, unsent = self._slots.lose(), self._outgoing.unsent
        self._slots, self._outgoing = Slots(), Outgoing()
        self.resident.clear()
        self._load, self._in_flight_at_report = engine_pb2.LoadReport(), 0
        self._liveness.forget()
        if self.state is LinkState.OPEN:
            self._move(LinkState.CONNECTING)
        for ticket in tickets:
            had_request = not is_ours and ticket.slot not in unsent
            ticket.fail(EngineLostError(f"engine {self.engine_id}: {cause}", had_request=had_request))

    def _move(self, state: LinkState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"session {self.engine_id}: {self.state.name} -> {state.name}")
        self.state = state
        self._on_change()
