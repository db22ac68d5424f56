"""A stream of the asyncio client, which outlives the connections and gateways that carry it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
from loraplex_common.errors import LoraplexError, StreamInterruptedError

from loraplex_client._aio.waiting import CallOwner, Flag, next_message
from loraplex_client._errors import loraplex_error
from loraplex_client.events import Event, Finished

if TYPE_CHECKING:
    from loraplex.v1 import gateway_pb2_grpc

    from loraplex_client._aio.waiting import GenerateCall
    from loraplex_client._connection import Metadata
    from loraplex_client._gateways import Gateways
    from loraplex_client._resume import StreamProgress


class AsyncGenerateStream(CallOwner, AsyncIterator[Event]):
    """The events of one generation, in order; the last is `Finished`.

    If the connection or its gateway is lost once the stream has started, it goes on through the next one, within its
    deadline: nothing is missing and nothing comes twice. ``resume=False`` turns that off.

    Leaving it early cancels the request, which frees all that the engine holds for it: ``aclose``, the end of an
    ``async with`` block, dropping it, or cancelling the task that reads it.

    Attributes:
        request_id: The request's id, for `AsyncClient.cancel`.
    """

    def __init__(
        self, gateways: Gateways[gateway_pb2_grpc.GatewayServiceAsyncStub], progress: StreamProgress, metadata: Metadata
    ) -> None:
        self.request_id = progress.request_id
        self._progress = progress
        self._metadata = metadata
        self._gateways = gateways
        self._is_over = False
        self._closed = Flag()
        self._gateway = gateways.pick()
        self._call = self._open()

    @property
    def num_resumes(self) -> int:
        """How often the stream went on through another call."""
        return self._progress.num_resumes

    async def __anext__(self) -> Event:
        """Return the next event.

        Raises:
            LoraplexError: If the request failed.
        """
        while not self._is_over:
            try:
                event = await self._receive()
            except LoraplexError as error:
                if self._is_over:  # closed by another task while this one waited
                    break
                await self._go_on_after(error)
                continue
            if isinstance(event, Finished):
                self._is_over = True
            if event is not None:
                return event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        self._is_over = True
        self._closed.set()
        self._call.cancel()

    async def __aenter__(self) -> AsyncGenerateStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _open(self) -> GenerateCall:
        request, timeout_s = self._progress.next_request(), self._progress.time_left_s
        return self._gateway.stub.Generate(request, timeout=timeout_s, metadata=self._metadata)

    async def _receive(self) -> Event | None:
        try:
            response = await next_message(self._call)
        except grpc.RpcError as error:
            raise loraplex_error(error, self._gateway.target) from error
        if response is None:
            raise StreamInterruptedError("the stream ended without a final event")
        return self._progress.take(response)

    async def _go_on_after(self, error: LoraplexError) -> None:
        """Begin the next attempt; raises the error if there is to be none."""
        self._call.cancel()
        try:
            pause_s = self._progress.pause_s(error, is_closed=self._gateways.is_closed)
        except LoraplexError:
            self._is_over = True
            raise
        if await self._closed.wait(pause_s):
            return
        if self._gateways.is_closed:  # meanwhile
            self._is_over = True
            raise error
        self._gateway = self._gateways.after(self._gateway, error)
        try:
            self._call = self._open()
        except ValueError:  # what gRPC says of a channel that another thread has closed since
            self._is_over = True
            raise error from None
        if self._closed.is_set():  # by another thread, since
            self._call.cancel()
