"""Runs one AttachEngine stream: hello and welcome, then both directions until either ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

from loraplex_common.errors import DeadlineError, InvalidParameterError
from loraplex_common.tasks import cancel_and_wait

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from loraplex_adapter_store.attach.attached import AttachedEngines
    from loraplex_adapter_store.attach.messages import FromEngine, Hello, ToEngine
    from loraplex_adapter_store.attach.session import EngineSession

HELLO_TIMEOUT_S: Final = 10.0
Wire = TypeVar("Wire")


async def read_hello(messages: AsyncIterator[Wire], convert: Callable[[Wire], Hello]) -> Hello:
    """Return the first message of a stream.

    Raises:
        InvalidParameterError: If the stream ends before it, or its first message is not a hello.
        DeadlineError: If no message comes in time.
    """
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            return convert(await anext(messages))
    except StopAsyncIteration:
        raise InvalidParameterError("the stream ended before the hello", field="hello") from None
    except TimeoutError:
        raise DeadlineError(f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None


async def run_session(
    attached: AttachedEngines, hello: Hello, messages: AsyncIterator[FromEngine], *, owner: str
) -> AsyncGenerator[EngineSession | ToEngine, None]:
    """Yield the session, then all messages for the engine, until the engine sends no more.

    Raises:
        InvalidParameterError: If the engine breaks the protocol.
        RoleForbiddenError: If another principal than ``owner`` has attached the engine.
    """
    async with attached.attach(hello, owner) as session:
        reader = asyncio.create_task(_read(session, messages), name=f"read {hello.engine_id}")
        try:
            yield session
            async for message in session.outgoing():
                yield message
            if reader.done():
                reader.result()
        finally:
            await cancel_and_wait(reader)


async def _read(session: EngineSession, messages: AsyncIterator[FromEngine]) -> None:
    try:
        async for message in messages:
            session.handle(message)
    finally:
        session.end()
