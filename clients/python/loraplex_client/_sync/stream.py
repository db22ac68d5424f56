"""A stream of the blocking client, which outlives the connections and gateways that carry it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
from loraplex_common.errors import LoraplexError, StreamInterruptedError

from loraplex_client._errors import loraplex_error
from loraplex_client.events import Event, Finished

if TYPE_CHECKING:
    from loraplex.v1 import gateway_pb2, gateway_pb2_grpc

    from loraplex_client._connection import Metadata
    from loraplex_client._gateways import Gateways
    from loraplex_client._resume import StreamProgress


class GenerateStream(Iterator[Event]):
    """The events of one generation, in order; the last is `Finished`.

    If the connection or its gateway is lost once the stream has started, it goes on through the next one, within its
    deadline: nothing is missing and nothing comes twice. ``resume=False`` turns that off.

    Leaving it early (``close``, the end of a ``with`` block, or dropping it) cancels the request, which frees all that
    the engine holds for it.

    Attributes:
        request_id: The request's id, for `Client.cancel`.
    """

    def __init__(
        self, gateways: Gateways[gateway_pb2_grpc.GatewayServiceStub], progress: StreamProgress, metadata: Metadata
    ) -> None:
        self.request_id = progress.request_id
        self._progress = progress
        self._metadata = metadata
        self._gateways = gateways
        self._is_over = False
        self._closed = threading.Event()
        self._gateway = gateways.pick()
        self._call = self._open()

    @property
    def num_resumes(self) -> int:
        """How often the stream went on through another call."""
        return self._progress.num_resumes

    def __next__(self) -> Event:
        """Return the next event.

        Raises:
            LoraplexError: If the request failed.
        """
        while not self._is_over:
            try:
                event = self._receive()
            except LoraplexError as error:
                if self._is_over:  # closed by another thread while this one waited
                    break
                self._go_on_after(error)
                continue
            if isinstance(event, Finished):
                self._is_over = True
            if event is not None:
                return event
        raise StopIteration

    def close(self) -> None:
        """Cancel the request if it still runs."""
        self._is_over = True
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> GenerateStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if call := getattr(self, "_call", None):  # absent if the first call could not begin
            call.cancel()

    def _open(self) -> grpc._CallIterator[gateway_pb2.GenerateResponse]:
        request, timeout_s = self._progress.next_request(), self._progress.time_left_s
        return self._gateway.stub.Generate(request, timeout=timeout_s, metadata=self._metadata)

    def _receive(self) -> Event | None:
        try:
            return self._progress.take(next(self._call))
        except StopIteration:
            raise StreamInterruptedError("the stream ended without a final event") from None
        except grpc.RpcError as error:
            raise loraplex_error(error, self._gateway.target) from error

    def _go_on_after(self, error: LoraplexError) -> None:
        """Begin the next attempt; raises the error if there is to be none."""
        self._call.cancel()
        try:
            pause_s = self._progress.pause_s(error, is_closed=self._gateways.is_closed)
        except LoraplexError:
            self._is_over = True
            raise
        if self._closed.wait(pause_s):
            return
        self._gateway = self._gateways.after(self._gateway, error)
        try:
            self._call = self._open()
        except ValueError:  # what gRPC says of a channel that was closed meanwhile
            self._is_over = True
            raise error from None
        if self._closed.is_set():  # meanwhile
            self._call.cancel()
