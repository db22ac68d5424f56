"""An upload or a push whose messages cannot be made fails with what making them failed with, and the store keeps nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_client import AsyncClient, Client, ImportProgress
from loraplex_common.errors import CancelledRequestError, InvalidParameterError, RemoteError
from support.gateway_double import StoreDouble, serving
from support.tcp_relay import TcpRelay
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TIMEOUT_S = 30.0


class MyError(Exception):
    """The caller's own."""


class MyExit(BaseException):
    """The caller's own, and no `Exception`: like that of Ctrl-C."""


class Reader(StoreDouble):
    """A store that reads pushes to their end, and keeps those that come whole."""

    def PushAdapter(  # noqa: N802
        self, request_iterator: Iterator[pb.PushAdapterRequest], context: grpc.ServicerContext
    ) -> pb.PushAdapterResponse:
        requests = list(request_iterator)
        if requests and requests[-1].HasField("finish"):  # else cancelled, which looks like the end here
            self.uploads["mine"] = {"": b"".join(request.data for request in requests)}
        return pb.PushAdapterResponse()


@pytest.fixture
def store() -> StoreDouble:
    return Reader()


@pytest.fixture
def target(store: StoreDouble) -> Iterator[str]:
    with serving(store=store) as target:
        yield target


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    return tmp_path


def failing_at(count: int, failure: Callable[[], object]) -> Callable[[ImportProgress], None]:
    """Return a function that is told of progress, and does something when it is called so many times."""
    calls = iter(range(1, 1000))

    def told(_: ImportProgress) -> None:
        if next(calls) == count:
            failure()

    return told


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


async def upload(target: str, directory: Path, progress: Callable[[ImportProgress], None], *, is_async: bool) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        if is_async:
            async with AsyncClient("127.0.0.1:1", store_target=target) as client:
                await client.adapters.upload("mine", directory, progress=progress)
        else:
            with Client("127.0.0.1:1", store_target=target) as client:
                await asyncio.to_thread(client.adapters.upload, "mine", directory, progress=progress)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [MyError("mine"), MyExit("mine"), OSError(5, "mine"), asyncio.CancelledError("mine")])
@pytest.mark.parametrize("count", [1, 3])
async def test_what_the_callers_function_raises_is_what_the_upload_raises(
    target: str, store: StoreDouble, directory: Path, *, is_async: bool, error: BaseException, count: int
) -> None:
    with pytest.raises(type(error), match="mine") as caught:
        await upload(target, directory, failing_at(count, raising(error)), is_async=is_async)

    assert caught.value is error
    assert store.uploads == {}


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_file_that_goes_away_under_way_is_named(
    target: str, store: StoreDouble, directory: Path, *, is_async: bool
) -> None:
    gone = directory / "adapter_model.safetensors"

    with pytest.raises(InvalidParameterError, match=r"adapter_model[.]safetensors cannot be read: No such file"):
        await upload(target, directory, failing_at(1, gone.unlink), is_async=is_async)

    assert store.uploads == {}


async def test_an_upload_whose_task_is_cancelled_is_cancelled(target: str, store: StoreDouble, directory: Path) -> None:
    """Even if the caller's function fails for that."""
    loop = asyncio.get_running_loop()

    def fail() -> None:
        loop.call_soon_threadsafe(task.cancel)
        raise MyError

    task = asyncio.create_task(upload(target, directory, failing_at(1, fail), is_async=True))

    with pytest.raises((asyncio.CancelledError, MyError)):
        await task

    assert store.uploads == {}


async def test_an_upload_whose_client_is_closed_says_so(target: str, store: StoreDouble, directory: Path) -> None:
    client = AsyncClient("127.0.0.1:1", store_target=target)
    loop = asyncio.get_running_loop()

    def close() -> None:
        asyncio.run_coroutine_threadsafe(client.close(), loop).result(TIMEOUT_S)

    with pytest.raises(CancelledRequestError, match="the call or its client was closed"):
        async with asyncio.timeout(TIMEOUT_S):
            await client.adapters.upload("mine", directory, progress=failing_at(1, close))

    assert store.uploads == {}


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_upload_whose_store_goes_away_says_so(target: str, directory: Path, *, is_async: bool) -> None:
    """It may be asked for again: gRPC's core once aborted the process here, or said that the call was cancelled."""
    loop = asyncio.get_running_loop()
    for _ in range(10):
        async with TcpRelay(target) as relay:

            def lose(_: ImportProgress, relay: TcpRelay = relay) -> None:
                asyncio.run_coroutine_threadsafe(lose_connection(relay), loop).result(TIMEOUT_S)

            with pytest.raises(RemoteError, match="cannot reach") as caught:
                await upload(relay.target, directory, lose, is_async=is_async)

        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_small_upload_whose_connection_is_lost_is_sent_again(
    target: str, store: StoreDouble, directory: Path, *, is_async: bool
) -> None:
    (directory / "adapter_model.safetensors").write_bytes(bytes(1000))
    loop = asyncio.get_running_loop()
    async with TcpRelay(target) as relay:

        def lose() -> None:
            asyncio.run_coroutine_threadsafe(lose_connection(relay), loop).result(TIMEOUT_S)

        await upload(relay.target, directory, failing_at(1, lose), is_async=is_async)

        assert relay.num_connections >= 2
    assert set(store.uploads) == {"mine"}


async def lose_connection(relay: TcpRelay) -> None:
    await eventually(lambda: relay.num_open > 0)
    relay.reset()


class Unreadable:
    """A tensor on a device that is lost when its turn comes."""

    dtype = "float32"
    shape = (4, 4)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise MyError("the device is lost")


async def push(target: str, state_dict: dict[str, Any], *, is_async: bool) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        if is_async:
            async with AsyncClient("127.0.0.1:1", store_target=target) as client:
                await client.adapters.push("mine", state_dict, {})
        else:
            with Client("127.0.0.1:1", store_target=target) as client:
                await asyncio.to_thread(client.adapters.push, "mine", state_dict, {})


@pytest.mark.parametrize("is_async", [False, True])
async def test_what_reading_a_tensor_raises_is_what_the_push_raises(
    target: str, store: StoreDouble, *, is_async: bool
) -> None:
    with pytest.raises(MyError, match="the device is lost"):
        await push(target, {"a": Unreadable()}, is_async=is_async)

    assert store.uploads == {}
