"""What dies while requests run, and what must go on all the same."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_client import AsyncClient, Started
from loraplex_common.errors import LoraplexError, StoreUnavailableError
from loraplex_engine.rpc.store_silence import LEAST_S
from support.adapters import Recipe, write_adapter
from support.generation import PROMPT, greedy, greedy_all, read_tokens, start
from support.stack import Stack, StackFlags, assert_idle, read_metrics, running_stack
from support.stack_fixtures import TINY_RECIPES, import_all
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

STORE_WAIT_S = 8.0
LONG = 400
WARM = ("tiny-a", "tiny-b", None)
COLD = ("tiny-c", "tiny-d")


@pytest.fixture(scope="module")
def fragile_stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose processes these tests kill, one after another, and put back."""
    flags = StackFlags(
        engine=(*StackFlags().engine, "--store-wait-s", str(STORE_WAIT_S)),
    )
    with running_stack(tmp_path_factory.mktemp("fragile"), *tiny_world, flags) as stack:
        yield stack


@pytest.fixture
async def client(fragile_stack: Stack) -> AsyncIterator[AsyncClient]:
    fragile_stack.valkey.start()
    if not fragile_stack.store.is_running:  # a test before this one failed half-way
        fragile_stack.restart_store()
    import_all(fragile_stack)
    client = fragile_stack.client()
    yield client
    await client.close()
    for engine in fragile_stack.engines:
        if engine.is_running:
            await assert_idle(engine)


async def started(client: AsyncClient, adapters: tuple[str | None, ...]) -> list[asyncio.Task[list[int]]]:
    """Start long streams and return their readers once all have begun."""
    streams = [start(client, adapter, LONG) for adapter in adapters]
    for stream in streams:
        assert isinstance(await anext(stream), Started)
    return [asyncio.create_task(read_tokens(stream)) for stream in streams]


def new_adapter(stack: Stack, name: str, seed: int) -> Path:
    return write_adapter(stack.import_root / name, stack.model, Recipe(seed=seed))


async def import_cold(stack: Stack, client: AsyncClient, name: str, seed: int) -> None:
    """Import an adapter that no engine has, and wait until the gateway knows its name."""
    await client.adapters.import_directory(name, new_adapter(stack, name, seed))

    async def is_known() -> bool:
        return name in {model.name for model in await client.list_models()}

    await eventually(is_known)


async def test_streams_outlive_the_adapter_store_and_misses_wait_for_its_return(
    fragile_stack: Stack, client: AsyncClient
) -> None:
    stack = fragile_stack
    alone = await greedy_all(client, WARM, LONG)
    await import_cold(stack, client, "late", 200)
    running = await started(client, WARM)

    stack.store.kill()
    miss = asyncio.create_task(greedy(client, "late"))
    warm = await greedy(client, "tiny-a", LONG)
    assert not miss.done()
    await asyncio.to_thread(stack.restart_store)

    assert await asyncio.gather(*running) == alone
    assert warm == alone[0]
    assert len(await miss) == 16
    again = stack.client()
    names = {adapter.name async for adapter in again.adapters.list()}
    await again.close()
    assert {*TINY_RECIPES, "late"} <= names


async def test_the_store_pushes_nothing_again_after_its_restart(fragile_stack: Stack, client: AsyncClient) -> None:
    stack = fragile_stack
    await greedy_all(client, tuple(TINY_RECIPES))
    loads = read_metrics(stack.engines[0])["loraplex_engine_adapter_loads_total"]

    stack.store.kill()
    await asyncio.to_thread(stack.restart_store)

    async def is_attached() -> bool:
        return read_metrics(stack.store).get("loraplex_store_engines", 0.0) == 1.0

    await eventually(is_attached)
    await greedy_all(client, tuple(TINY_RECIPES))
    assert read_metrics(stack.engines[0])["loraplex_engine_adapter_loads_total"] == loads
    assert read_metrics(stack.store).get("loraplex_store_push_bytes_total", 0.0) == 0.0


async def test_a_store_that_stays_away_makes_misses_unavailable_with_a_retry_time(
    fragile_stack: Stack, client: AsyncClient
) -> None:
    stack = fragile_stack
    await import_cold(stack, client, "cold", 201)
    await greedy(client, "tiny-a")

    stack.store.kill()
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        await greedy(client, "cold")
    waited_s = time.monotonic() - began_s
    warm = await greedy(client, "tiny-a")
    await asyncio.to_thread(stack.restart_store)

    assert caught.value.retry_after_s is not None
    assert waited_s < STORE_WAIT_S + 10  # the client itself tries three times
    assert len(warm) == 16
    assert len(await greedy(client, "cold")) == 16


async def test_a_store_that_hangs_makes_misses_unavailable_as_soon_as_one_that_is_gone(
    fragile_stack: Stack, client: AsyncClient
) -> None:
    stack = fragile_stack
    await import_cold(stack, client, "frozen", 206)
    await greedy(client, "tiny-a")

    stack.store.signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="has not answered for") as caught:
            await greedy(client, "frozen")
        waited_s = time.monotonic() - began_s
        assert len(await greedy(client, "tiny-a")) == 16
    finally:
        stack.store.signal(signal.SIGCONT)

    assert caught.value.retry_after_s is not None
    assert waited_s < max(STORE_WAIT_S, LEAST_S) + 10  # gRPC itself notices after 40 s
    await eventually(lambda: serves(client, "frozen"))


async def serves(client: AsyncClient, name: str) -> bool:
    try:
        return len(await greedy(client, name)) == 16
    except StoreUnavailableError:
        return False


async def test_streams_outlive_valkey_and_nothing_imported_is_lost(fragile_stack: Stack, client: AsyncClient) -> None:
    stack = fragile_stack
    directory = new_adapter(stack, "precious", 202)
    revision = (await client.adapters.import_directory("precious", directory)).revision.digest
    alone = await greedy_all(client, WARM, LONG)
    running = await started(client, WARM)

    stack.valkey.kill()
    other = new_adapter(stack, "refused", 203)
    with pytest.raises(LoraplexError) as refused:
        await client.adapters.import_directory("refused", other)
    tokens_meanwhile = await greedy(client, "tiny-b", LONG)
    stack.valkey.start()

    assert await asyncio.gather(*running) == alone
    assert tokens_meanwhile == alone[1]
    assert refused.value.reason == "STORE_UNAVAILABLE"

    async def is_back() -> bool:
        try:
            return (await client.adapters.get("precious")).resolved.digest == revision  # type: ignore[union-attr]
        except LoraplexError:
            return False

    await eventually(is_back)
    assert len(await greedy(client, "precious")) == 16
    await client.adapters.import_directory("refused", other)
    assert len(await greedy(client, "refused")) == 16


async def test_another_engine_goes_on_where_a_killed_one_stopped(fragile_stack: Stack, client: AsyncClient) -> None:
    stack = fragile_stack
    alone = await greedy_all(client, WARM, LONG)
    doomed = stack.engines[-1]
    running = await started(client, WARM)
    await asyncio.to_thread(stack.start_engine)

    doomed.kill()

    assert await asyncio.gather(*running) == alone
    assert await greedy_all(client, WARM, LONG) == alone
    stack.engines.remove(doomed)


async def test_an_engine_that_drains_finishes_its_streams(fragile_stack: Stack, client: AsyncClient) -> None:
    stack = fragile_stack
    alone = await greedy_all(client, WARM, LONG)
    leaving = stack.engines[-1]
    running = await started(client, WARM)
    await asyncio.to_thread(stack.start_engine)

    status = await asyncio.to_thread(leaving.stop)

    assert status == 0
    assert await asyncio.gather(*running) == alone
    assert await greedy(client, "tiny-a", prompt_token_ids=PROMPT[:2])
    stack.engines.remove(leaving)
