"""Whole and streamed answers that end their generation as soon as the client is gone or no longer reads."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import CancelledRequestError, LoraplexError, SlowConsumerError
from loraplex_common.interceptors import internal_error

from loraplex_gateway.openai.direct import DirectWriter, direct_writer
from loraplex_gateway.requests.stall import StallGuard
from loraplex_gateway.types import Started

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_common.admissions import Admission
    from starlette.types import Receive, Scope, Send

    from loraplex_gateway.openai.answer import Answer
    from loraplex_gateway.openai.choices import Choices
    from loraplex_gateway.quotas.calls import QuotaCall
    from loraplex_gateway.requests.tap import Sink, Tap
    from loraplex_gateway.types import Event

JSON: Final = b"application/json"
SSE: Final = b"text/event-stream; charset=utf-8"
NUMERICS_HEADER: Final = b"x-loraplex-numerics"


class GenerationResponse:
    """An ASGI response that runs a generation; the same for every API, which differ in how their `Answer` is written.

    Headers are sent with the first event of a streamed answer, so that a refusal still has its own HTTP status.

    Args:
        choices: What is generated.
        answer: Writes the API's answer.
        admission: The caller; the answer ends with its right to ask.
        quota: What the tenant may use, for the headers.
        slow_client_s: Longest time that one write may wait.
    """

    def __init__(
        self,
        choices: Choices,
        answer: Answer,
        *,
        admission: Admission,
        quota: QuotaCall,
        slow_client_s: float,
    ) -> None:
        self._admission = admission
        self._choices = choices
        self._answer = answer
        self._quota = quota
        self._slow_client_s = slow_client_s
        self._has_headers = False
        self._guard: StallGuard | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that disconnects ends it.

        Raises:
            UnauthenticatedError: If the credential was taken away before there was anything to say.
        """
        work = asyncio.create_task(self._respond(scope, receive, send), name="http-generation")
        watch = asyncio.create_task(_disconnected(receive), name="http-disconnect")
        try:
            with self._admission.running(work.cancel):
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if not work.cancelled():
            work.result()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = StallGuard(self._slow_client_s)
        try:
            await self._run(scope, receive, send)
        finally:
            self._guard.close()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._answer.is_stream:
                await self._stream(scope, send)
            else:
                await self._whole(send)
        except asyncio.CancelledError:
            if not self._admission.has_lapsed:
                raise
            await self._fail(self._admission.error(), scope, receive, send)
        except (SlowConsumerError, CancelledRequestError):
            raise asyncio.CancelledError from None  # an answer would have no reader
        except Exception as error:
            failure = error if isinstance(error, LoraplexError) else internal_error("http", error)
            await self._fail(failure, scope, receive, send)

    async def _fail(self, failure: LoraplexError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._has_headers:
            await self._write(send, self._answer.failure(failure), more=False)
        else:
            response = self._answer.refusal(failure)
            response.headers.update(dict(self._quota.headers))
            await response(scope, receive, send)

    async def _whole(self, send: Send) -> None:
        seen: list[list[Event]] = [[] for _ in range(self._answer.num_choices)]
        sinks = [_Collector(self._choices, events) for events in seen]
        async with aclosing(self._choices.run(sinks.__getitem__)) as events:
            async for choice, event in events:
                seen[choice].append(event)
        body = self._answer.whole(seen)
        numerics = _numerics(each for choice in seen for each in choice)
        await self._start(send, JSON, (b"content-length", str(len(body)).encode()), *numerics)
        await self._write(send, body, more=False)

    async def _stream(self, scope: Scope, send: Send) -> None:
        direct = direct_writer(scope)

        def sink_of(choice: int) -> Sink | None:
            return None if direct is None else _Frames(self._choices, self._answer, choice, direct)

        async with aclosing(self._choices.run(sink_of)) as events:
            async for choice, event in events:
                if not self._has_headers:
                    await self._start(send, SSE, (b"cache-control", b"no-cache"), *_numerics((event,)))
                if frame := self._answer.frame(choice, event):
                    await self._write(send, frame)
        await self._write(send, self._answer.end(), more=False)

    async def _start(self, send: Send, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        self._has_headers = True
        quota = [(name.encode(), value.encode()) for name, value in self._quota.headers]
        all_headers = [(b"content-type", content_type), *headers, *quota]
        await send({"type": "http.response.start", "status": 200, "headers": all_headers})

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        guard = self._guard
        assert guard is not None  # `_respond` has made it
        guard.writing()
        try:
            await send({"type": "http.response.body", "body": data, "more_body": more})
        except asyncio.CancelledError:
            if guard.has_fired:
                raise guard.error() from None
            raise
        guard.written()


class _Collector:
    """A sink that keeps the chunks of one choice for a whole answer."""

    def __init__(self, choices: Choices, events: list[Event]) -> None:
        self._choices = choices
        self._events = events

    def is_ready(self) -> bool:
        return self._choices.is_waiting

    def notify(self, tap: Tap) -> None:
        if (chunk := tap.pull()) is not None:
            self._events.append(chunk)


class _Frames:
    """A sink that writes the frames of one choice, in the turn of the event loop in which their tokens come."""

    def __init__(self, choices: Choices, answer: Answer, choice: int, direct: DirectWriter) -> None:
        self._choices = choices
        self._answer = answer
        self._choice = choice
        self._direct = direct

    def is_ready(self) -> bool:
        return self._choices.is_waiting and self._direct.is_ready

    def notify(self, tap: Tap) -> None:
        chunk = tap.pull()
        if chunk is not None and (frame := self._answer.frame(self._choice, chunk)):
            self._direct.write(frame)


def _numerics(events: Iterable[Event]) -> list[tuple[bytes, bytes]]:
    """Return the header that says what loading did to the base model's numbers on the engines that answer; none if unknown."""
    found = {event.numerics: None for event in events if isinstance(event, Started) and event.numerics}
    return [(NUMERICS_HEADER, ", ".join(found).encode())] if found else []


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
