"""A call ends with the right to make it: over real connections, for every shape of call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common import admissions, auth
from loraplex_common.auth import Authenticator
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.grpc_channel import open_channel
from support.certificates import write
from support.echo_service import TIMEOUT_S, Echo, EchoClient, failure, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LINES = ["gone acme", "stays other", "boss ops admin"]
AT_MOST_S = 5.0


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    write(path, "\n".join(LINES))
    return path


@pytest.fixture
async def authenticator(keys: Path) -> AsyncIterator[Authenticator]:
    authenticator = Authenticator.from_file(keys)
    following = asyncio.create_task(authenticator.follow())
    yield authenticator
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def forever() -> AsyncIterator[str]:
    yield "first"
    await asyncio.Event().wait()


def begin(client: EchoClient, shape: str) -> Any:
    """Return a coroutine that waits for a call of a shape which never ends by itself."""

    async def read(call: Any) -> None:
        async for _ in call:
            pass

    async def answer(call: Any) -> None:
        await call

    calls = {
        "once": lambda: answer(client.once("x")),
        "stream": lambda: read(client.stream("x")),
        "join": lambda: answer(client.join(forever())),
        "chat": lambda: read(client.chat(forever())),
    }
    return calls[shape]()


@pytest.mark.parametrize("shape", ["once", "stream", "join", "chat"])
async def test_a_running_call_whose_key_is_removed_ends_and_no_other_does(
    echo: Echo, authenticator: Authenticator, keys: Path, shape: str
) -> None:
    num_released = 0

    async def wait(_text: str, _context: Any) -> str:
        nonlocal num_released
        try:
            return str(await asyncio.Event().wait())
        finally:
            num_released += 1

    async def drip(text: str, context: Any) -> AsyncIterator[str]:
        yield "first"
        await wait(text, context)

    echo.unary, echo.stream = wait, drip
    async with (
        running(echo, authenticator=authenticator) as (_, target),
        open_channel(target, api_key="gone") as one,
        open_channel(target, api_key="stays") as two,
    ):
        ends = asyncio.create_task(failure(begin(EchoClient(one), shape)))
        stays = asyncio.create_task(begin(EchoClient(two), shape))
        async with asyncio.timeout(TIMEOUT_S):
            while authenticator.num_running < 2:  # noqa: ASYNC110 -- calls on their way have no event
                await asyncio.sleep(0.01)

        write(keys, "\n".join(LINES[1:]))
        error = await asyncio.wait_for(ends, AT_MOST_S)

        assert isinstance(error, UnauthenticatedError)
        assert "is not let in any more" in error.message
        assert (num_released, stays.done()) == (1, False)
        stays.cancel()
        await asyncio.gather(stays, return_exceptions=True)


async def test_a_role_that_is_taken_away_ends_what_it_allowed(
    echo: Echo, authenticator: Authenticator, keys: Path
) -> None:
    echo.unary = echo.wait_forever
    async with running(echo, authenticator=authenticator) as (_, target), open_channel(target, api_key="boss") as one:
        ends = asyncio.create_task(failure(EchoClient(one).once("x")))
        async with asyncio.timeout(TIMEOUT_S):
            while not authenticator.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        write(keys, "\n".join([*LINES[:2], "boss ops"]))

        assert isinstance(await asyncio.wait_for(ends, AT_MOST_S), UnauthenticatedError)


async def test_a_client_that_reads_nothing_is_reset_when_its_key_is_removed(
    echo: Echo, authenticator: Authenticator, keys: Path
) -> None:
    echo.stream = echo.flood
    async with running(echo, authenticator=authenticator) as (_, target), open_channel(target, api_key="gone") as one:
        call = EchoClient(one).stream("x")
        await call.read()

        write(keys, "\n".join(LINES[1:]))

        await asyncio.wait_for(echo.released.wait(), AT_MOST_S)
        async with asyncio.timeout(TIMEOUT_S):
            while authenticator.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_handler_that_swallows_its_end_is_ended_again(
    echo: Echo, authenticator: Authenticator, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admissions, "END_AGAIN_S", 0.1)
    monkeypatch.setattr(auth, "CHECK_EVERY_S", 0.1)

    async def stubborn(_text: str, _context: Any) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()
        return ""

    echo.unary = stubborn
    async with running(echo, authenticator=authenticator) as (_, target), open_channel(target, api_key="gone") as one:
        ends = asyncio.create_task(failure(EchoClient(one).once("x")))
        async with asyncio.timeout(TIMEOUT_S):
            while not authenticator.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        write(keys, "\n".join(LINES[1:]))

        assert isinstance(await asyncio.wait_for(ends, AT_MOST_S), UnauthenticatedError)
