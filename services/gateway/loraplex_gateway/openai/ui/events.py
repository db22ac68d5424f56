"""Server-sent events of the page at /ui: the fleet as `WatchFleet` tells it, and the imports of the adapter store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.version import package_version

from loraplex_gateway.fleet.as_json import as_json
from loraplex_gateway.openai.responses import SSE
from loraplex_gateway.openai.ui.imports import ImportWatch
from loraplex_gateway.requests.stall import StallGuard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.admissions import Admission
    from starlette.types import Receive, Scope, Send

    from loraplex_gateway.fleet.news import News
    from loraplex_gateway.fleet.watch import FleetReader
    from loraplex_gateway.openai.fleet_page import FleetPage

LOOK_S: Final = 1.0
"""Something is written at least so often, so that a page knows a lost gateway from a quiet one."""
PING: Final = b": still here\n\n"


class FleetEvents:
    """An ASGI response that tells what becomes of the fleet until its client goes, or the gateway.

    Args:
        page: What is told of.
        admission: The caller; the stream ends with its right to see this.
        slow_client_s: Longest time that one write may wait.
    """

    def __init__(self, page: FleetPage, admission: Admission, *, slow_client_s: float) -> None:
        self._page, self._admission = page, admission
        self._imports = ImportWatch(page.store)
        self._slow_client_s = slow_client_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer.

        Raises:
            UnauthenticatedError: If the credential was taken away before there was anything to say.
        """
        work = asyncio.create_task(self._respond(send), name="ui-events")
        gone = asyncio.create_task(_disconnected(receive), name="ui-disconnect")
        try:
            with self._admission.running(work.cancel):
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(work, gone)
        if not work.cancelled():
            work.result()

    async def _respond(self, send: Send) -> None:
        guard = StallGuard(self._slow_client_s)
        following = asyncio.create_task(self._imports.follow(), name="ui-imports")
        try:
            with self._page.fleet.reading() as reader:
                await self._stream(send, guard, reader, following)
        finally:
            guard.close()
            await cancel_and_wait(following)

    async def _stream(self, send: Send, guard: StallGuard, reader: FleetReader, following: asyncio.Task[None]) -> None:
        headers = [(b"content-type", SSE), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        parts = [_event("gateway", self._about())]
        while True:
            guard.writing()
            await send({"type": "http.response.body", "body": b"".join(parts) or PING, "more_body": True})
            guard.written()
            found = await reader.take(LOOK_S)
            if following.done():
                following.result()  # a fault of ours, which is told
            if found is None:
                break
            parts = [*await _engine_events(found), *self._import_events()]
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _about(self) -> dict[str, Any]:
        return {
            "gateway": self._page.gateway_id,
            "version": package_version(),
            "caller": "" if self._admission.is_open else self._admission.principal.name,
            "has_store": self._page.store is not None,
        }

    def _import_events(self) -> Sequence[bytes]:
        told = self._imports.take()
        return () if told is None else (_event("imports", told),)


async def _engine_events(found: Sequence[News]) -> list[bytes]:
    """Return the events of news, in turns of their own: a whole pool takes milliseconds to collect and to convert."""
    events = []
    for news in found:
        await asyncio.sleep(0)
        body = as_json(news)
        await asyncio.sleep(0)
        events.append(_event("engine", body))
    return events


def _event(name: str, body: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(body))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
