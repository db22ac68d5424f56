"""Where the two generating calls have their plain chunks written, beside the handler that waits for all else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from loraplex.v1 import gateway_pb2

from loraplex_gateway.grpc import wire
from loraplex_gateway.types import Chunk, Finished, Started

if TYPE_CHECKING:
    import grpc

    from loraplex_gateway.requests.stall import StallGuard
    from loraplex_gateway.requests.tap import Tap
    from loraplex_gateway.types import Event


class ChunkWriter:
    """A sink over one call; tokens that come while a write is under way go out together with the next one.

    The handler waits for `idle` before it writes itself, and closes it at its end. A write fails when the client is gone:
    gRPC cancels the handler then, or else the handler meets the failure as soon as it has something to write.

    Args:
        context: The call.
        guard: Ends the handler if a write waits too long.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], guard: StallGuard) -> None:
        self._failure: Exception | None = None
        self._context = context
        self._guard = guard
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None  # while it waits for tokens
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def is_ready(self) -> bool:
        """Whether chunks may be handed over now."""
        return self._failure is None

    def notify(self, tap: Tap) -> None:
        """Write what the tap has, unless that is being done."""
        if self._task is None:
            self._is_idle.clear()
            self._task = self._loop.create_task(self._run(tap), name="chunk-writer")
        elif self._wake is not None:
            wake, self._wake = self._wake, None
            self._is_idle.clear()
            wake.set_result(None)

    async def settled(self) -> None:
        """Return once all that was handed over is written, or a write has failed."""
        await self._is_idle.wait()

    async def idle(self) -> None:
        """Return once all that was handed over is written; raises what a write failed with."""
        await self._is_idle.wait()
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Write no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, tap: Tap) -> None:
        guard = self._guard
        try:
            while True:
                while (chunk := tap.pull()) is not None:
                    guard.writing()
                    await self._context.write(wire.chunk_response(chunk))
                    guard.written()
                self._wake = self._loop.create_future()
                self._is_idle.set()
                await self._wake
        except Exception as error:
            self._failure = error
        finally:
            self._is_idle.set()


class WholeAnswer:
    """A sink that gathers the answer of GenerateOnce."""

    def __init__(self) -> None:
        self._message = gateway_pb2.GenerateOnceResponse()
        self._text: list[str] = []

    def is_ready(self) -> bool:
        """Whether chunks may be handed over now."""
        return True

    def notify(self, tap: Tap) -> None:
        """Gather what the tap has."""
        if (chunk := tap.pull()) is not None:
            self.add(chunk)

    def add(self, event: Event) -> None:
        """Gather an event."""
        if isinstance(event, Started):
            self._message.started.CopyFrom(wire.started(event))
        elif isinstance(event, Chunk):
            self._text.append(event.text)
            self._message.token_ids.extend(event.token_ids)
            self._message.logprobs.extend(wire.positions(event.logprobs))
        elif isinstance(event, Finished):
            self._message.finished.CopyFrom(wire.finished(event))

    def message(self) -> gateway_pb2.GenerateOnceResponse:
        """Return the answer, once all events have been gathered."""
        self._message.text = "".join(self._text)
        return self._message
