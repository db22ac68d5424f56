"""Tells the adapter store what a gateway has taken in of the name table."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import adapter_store_pb2

from loraplex_common.log import get_logger
from loraplex_common.wake_up import WakeUp

if TYPE_CHECKING:
    from loraplex.v1 import adapter_store_pb2_grpc

TIMEOUT_S: Final = 2.0
PAUSE_S: Final = 0.2
"""Time after which an acknowledgement that was not heard is repeated."""
_NEVER: Final = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED})

_log = get_logger()


class Acknowledgements:
    """The acknowledgements of one stream; one at a time is under way, and says what is known by then.

    Args:
        watcher_id: The name that the stream was opened with; empty acknowledges nothing.
    """

    def __init__(self, watcher_id: str) -> None:
        self._watcher_id = watcher_id
        self._known: tuple[str, int] | None = None
        self._changed = WakeUp()

    def took_in(self, history_id: str, sequence: int) -> None:
        """Note that all names are as of a position."""
        self._known = (history_id, sequence)
        self._changed.notify()

    async def run(self, stub: adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub) -> None:
        """Send them until cancelled; ends by itself where they are not taken, so that changes do not wait for them."""
        said: tuple[str, int] | None = None
        while self._watcher_id:
            changed = self._changed.next
            if (known := self._known) is None or known == said:
                await changed.wait()
                continue
            request = adapter_store_pb2.AcknowledgeAliasesRequest(
                watcher_id=self._watcher_id, history_id=known[0], sequence=known[1]
            )
            try:
                await stub.AcknowledgeAliases(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() in _NEVER:
                    _log.info("the adapter store takes no acknowledgements", cause=error.details())
                    return
                _log.debug("an acknowledgement was not heard", cause=error.details())
                await asyncio.sleep(PAUSE_S)
            else:
                said = known
