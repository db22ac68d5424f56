"""The whole stack with a tiny model: what users and operators can do, over the wire."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pytest
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_client import AsyncClient, Chunk, Finished, FinishReason, Started
from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, ConflictError, SequenceGapError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.adapters import Recipe, write_adapter
from support.generation import PROMPT, greedy, greedy_all, read_tokens, start
from support.stack import Stack, assert_idle, read_load, read_metrics
from support.stack_fixtures import TINY_RECIPES, import_all
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

NAMES = (None, *TINY_RECIPES)
_numbers = itertools.count()


@pytest.fixture
async def client(tiny_stack: Stack) -> AsyncIterator[AsyncClient]:
    import_all(tiny_stack)
    client = tiny_stack.client()
    yield client
    await client.close()
    await assert_idle(tiny_stack.engines[0])


@pytest.fixture
async def engine(tiny_stack: Stack) -> AsyncIterator[engine_pb2_grpc.EngineServiceAsyncStub]:
    async with open_channel(tiny_stack.engines[0].grpc) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


async def import_new(stack: Stack, client: AsyncClient, recipe: Recipe) -> tuple[str, str]:
    """Import a new adapter under a name of its own; return name and revision."""
    name = f"own-{next(_numbers)}"
    directory = write_adapter(stack.import_root / name, stack.model, recipe)
    result = await client.adapters.import_directory(name, directory)
    return name, result.revision.digest


async def resident(engine: engine_pb2_grpc.EngineServiceAsyncStub) -> dict[str, engine_pb2.ResidentAdapter]:
    """Return all adapters of the engine by digest, read in pages of two."""
    found: dict[str, engine_pb2.ResidentAdapter] = {}
    token = ""
    while True:
        page = await engine.ListAdapters(engine_pb2.ListAdaptersRequest(page_size=2, page_token=token))
        assert len(page.adapters) <= 2
        found |= {adapter.digest: adapter for adapter in page.adapters}
        token = page.next_page_token
        if not token:
            return found


async def test_every_adapter_answers_differently_and_in_its_own_way_in_a_batch(client: AsyncClient) -> None:
    alone = [await greedy(client, name, 24) for name in NAMES]

    order = [index % len(NAMES) for index in range(30)]
    random.Random(0).shuffle(order)
    together = await greedy_all(client, [NAMES[index] for index in order], 24)

    assert len({tuple(tokens) for tokens in alone}) == len(NAMES)
    assert together == [alone[index] for index in order]


async def test_a_stream_is_started_chunks_finished_and_says_which_revision(
    tiny_stack: Stack, client: AsyncClient
) -> None:
    revisions = import_all(tiny_stack)

    events = [event async for event in start(client, "tiny-b", 6)]

    started, finished = events[0], events[-1]
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert len(chunks) == len(events) - 2
    assert (started.prompt_tokens, started.adapter_revision) == (len(PROMPT), revisions["tiny-b"])
    assert [chunk.sequence for chunk in chunks] == list(range(chunks[0].sequence, chunks[0].sequence + len(chunks)))
    assert [chunk.index for chunk in chunks] == list(
        itertools.accumulate((len(c.token_ids) for c in chunks[:-1]), initial=0)
    )
    assert finished.finish_reason is FinishReason.LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.output_tokens) == (len(PROMPT), 6)


async def test_text_in_gives_the_text_of_the_tokens(client: AsyncClient) -> None:
    result = await client.generate_once(
        prompt="the quick brown fox", adapter="tiny-a", temperature=0, max_new_tokens=20
    )

    assert result.text == await client.detokenize(result.token_ids, skip_special_tokens=True)


async def test_a_scale_of_zero_is_the_base_model(client: AsyncClient) -> None:
    base, scaled, whole = await asyncio.gather(
        greedy(client, None), greedy(client, "tiny-a", adapter_scale=0.0), greedy(client, "tiny-a")
    )

    assert scaled == base != whole


async def test_the_same_seed_draws_the_same_tokens_in_any_company(client: AsyncClient) -> None:
    def draw(seed: int) -> Any:
        return greedy(client, "tiny-c", 24, temperature=1.0, top_p=0.9, seed=seed)

    alone = await draw(7)
    beside = await asyncio.gather(draw(7), draw(8), greedy_all(client, NAMES))

    assert beside[0] == alone != beside[1]


async def test_a_new_import_moves_the_name_and_leaves_the_old_revision_reachable(
    tiny_stack: Stack, client: AsyncClient
) -> None:
    name, old = await import_new(tiny_stack, client, Recipe(seed=100))
    before = await greedy(client, name)
    await client.adapters.alias(name, "prod", old)

    write_adapter(tiny_stack.import_root / name, tiny_stack.model, Recipe(seed=101))
    new = (await client.adapters.import_directory(name, tiny_stack.import_root / name)).revision.digest

    async def is_moved() -> bool:
        return await greedy(client, name) != before

    await eventually(is_moved)
    latest = await greedy(client, name)
    assert await greedy_all(client, [f"{name}@{old}", f"{name}:prod", f"{name}@{new}"]) == [before, before, latest]


async def test_a_deleted_adapter_is_refused_while_its_running_streams_finish(
    tiny_stack: Stack, client: AsyncClient
) -> None:
    name, _ = await import_new(tiny_stack, client, Recipe(seed=102))
    alone = await greedy(client, name, 300)
    running = start(client, name, 300)
    assert isinstance(await anext(running), Started)

    await client.adapters.delete(name, force=True)

    async def is_refused() -> bool:
        try:
            await greedy(client, name, 1)
        except AdapterNotFoundError:
            return True
        return False

    await eventually(is_refused)
    assert await read_tokens(running) == alone


async def test_deleting_an_adapter_in_use_is_refused_without_force(tiny_stack: Stack, client: AsyncClient) -> None:
    name, _ = await import_new(tiny_stack, client, Recipe(seed=103))
    running = start(client, name, 400)
    assert isinstance(await anext(running), Started)

    async def is_refused() -> bool:
        try:
            await client.adapters.delete(name)
        except AdapterInUseError:
            return True
        await client.adapters.import_directory(name, tiny_stack.import_root / name)  # the store had not heard yet
        return False

    try:
        await eventually(is_refused)
    finally:
        await running.aclose()


async def test_the_openai_client_streams_from_an_adapter(tiny_stack: Stack, client: AsyncClient) -> None:
    expected = await client.generate_once(prompt="the lazy dog", adapter="tiny-a", temperature=0, max_new_tokens=12)
    web = openai.AsyncOpenAI(
        base_url=f"http://{tiny_stack.gateway.addresses['http']}/v1", api_key="none", max_retries=0
    )

    async with web:
        models = [model.id async for model in web.models.list()]
        stream = await web.completions.create(
            model="tiny-a", prompt="the lazy dog", temperature=0, max_tokens=12, stream=True
        )
        text = "".join([part.choices[0].text async for part in stream if part.choices])
        chat = await web.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=4
        )

    assert {"tiny", "tiny-a", "tiny-e"} <= set(models)
    assert text == expected.text
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 4


async def test_every_api_of_the_http_port_gives_an_adapters_chat_the_same_words(
    tiny_stack: Stack, client: AsyncClient
) -> None:
    url, turns = f"http://{tiny_stack.gateway.addresses['http']}", [{"role": "user", "content": "the lazy dog"}]
    asked: dict[str, Any] = {"model": "tiny-a", "temperature": 0}
    schema = {"type": "json_schema", "name": "n", "schema": {"enum": ["page"]}}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def answer(path: str, **body: Any) -> Any:
            response = await http.post(path, json={**asked, **body})
            assert response.status_code == 200, response.text
            return response.json()

        chat = await answer("/v1/chat/completions", messages=turns, max_tokens=12)
        response = await answer("/v1/responses", input=turns, max_output_tokens=12)
        message = await answer("/v1/messages", messages=turns, max_tokens=12)
        page = await answer("/v1/responses", input="a page?", text={"format": schema})

    text = chat["choices"][0]["message"]["content"]
    assert text == response["output"][0]["content"][0]["text"] == message["content"][0]["text"]
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert page["output"][0]["content"][0]["text"] == '"page"'
    assert page["status"] == "completed"


async def test_a_prefetched_adapter_is_warm_before_anybody_asks(
    tiny_stack: Stack, client: AsyncClient, engine: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    name, revision = await import_new(tiny_stack, client, Recipe(seed=104))

    await client.adapters.prefetch(name)

    async def is_on_device() -> bool:
        held = (await resident(engine)).get(revision)
        return held is not None and held.state == engine_pb2.ResidentAdapter.STATE_RESIDENT

    await eventually(is_on_device)  # by way of the arena: there is room to spare


async def test_an_adapter_can_be_pinned_unpinned_and_evicted_by_generation(
    tiny_stack: Stack, client: AsyncClient, engine: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    name, revision = await import_new(tiny_stack, client, Recipe(seed=105))
    tokens = await greedy(client, name)
    generation = (await resident(engine))[revision].generation

    pinned = (await engine.PinAdapter(engine_pb2.PinAdapterRequest(digest=revision))).adapter
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await engine.EvictAdapter(engine_pb2.EvictAdapterRequest(digest=revision))
    unpinned = (await engine.UnpinAdapter(engine_pb2.UnpinAdapterRequest(digest=revision))).adapter
    with pytest.raises(grpc.aio.AioRpcError) as conflict:
        await engine.EvictAdapter(engine_pb2.EvictAdapterRequest(digest=revision, require_generation=generation + 1))
    await engine.EvictAdapter(engine_pb2.EvictAdapterRequest(digest=revision, require_generation=generation))

    async def is_off_the_device() -> bool:
        return (await resident(engine))[revision].state == engine_pb2.ResidentAdapter.STATE_IN_ARENA

    await eventually(is_off_the_device)
    assert (pinned.pinned, unpinned.pinned) == (True, False)
    assert isinstance(error_from_rpc(refused.value), AdapterInUseError)
    assert isinstance(error_from_rpc(conflict.value), ConflictError)
    assert await greedy(client, name) == tokens
    assert (await resident(engine))[revision].generation > generation


async def test_residency_changes_can_be_watched_without_a_gap(
    tiny_stack: Stack, client: AsyncClient, engine: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    await greedy(client, "tiny-a")  # a watch from 0 would begin with what comes next
    position = (await engine.ListAdapters(engine_pb2.ListAdaptersRequest())).sequence
    name, revision = await import_new(tiny_stack, client, Recipe(seed=106))
    await greedy(client, name)

    states: list[int] = []
    sequences: list[int] = []
    async with asyncio.timeout(20):
        async for event in engine.WatchAdapters(engine_pb2.WatchAdaptersRequest(start_sequence=position)):
            sequences.append(event.sequence)
            if event.adapter.digest == revision:
                states.append(event.adapter.state)
            if states and states[-1] == engine_pb2.ResidentAdapter.STATE_RESIDENT:
                break

    adapter_states = engine_pb2.ResidentAdapter
    assert sequences == list(range(position + 1, position + 1 + len(sequences)))
    assert states[-3:] == [adapter_states.STATE_IN_ARENA, adapter_states.STATE_LOADING, adapter_states.STATE_RESIDENT]


async def test_a_watch_from_the_future_is_a_gap(engine: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in engine.WatchAdapters(engine_pb2.WatchAdaptersRequest(start_sequence=2**40)):
            pass

    assert isinstance(error_from_rpc(caught.value), SequenceGapError)


async def test_the_engines_metrics_name_its_adapters(tiny_stack: Stack, client: AsyncClient) -> None:
    await greedy_all(client, NAMES)

    metrics = read_metrics(tiny_stack.engines[0])
    load = await read_load(tiny_stack.engines[0])

    assert metrics["vllm:num_gpu_loaded_lora_adapters"] == load.adapters_resident >= len(TINY_RECIPES)
    assert metrics["vllm:lora_adapter_load_seconds_count"] >= len(TINY_RECIPES)
    assert metrics["loraplex_engine_leases"] == 0
    assert metrics["loraplex_engine_pool_pages"] == load.pages_total


async def test_a_next_turn_is_told_how_much_of_it_was_cached(client: AsyncClient, tiny_stack: Stack) -> None:
    before = read_metrics(tiny_stack.engines[0])["vllm:prefix_cache_hits_total"]
    prompt = tuple(range(7, 60))

    async def turn(name: str | None, token_ids: tuple[int, ...], salt: str = "") -> tuple[int, list[int]]:
        stream = start(client, name, 20, prompt_token_ids=token_ids, cache_salt=salt)
        events = [event async for event in stream]
        started = next(event for event in events if isinstance(event, Started))
        finished = next(event for event in events if isinstance(event, Finished))
        assert finished.usage.cached_tokens == started.cached_tokens
        return started.cached_tokens, [
            token for event in events if isinstance(event, Chunk) for token in event.token_ids
        ]

    name = next(iter(TINY_RECIPES))
    cached, answer = await turn(name, prompt)
    assert cached == 0
    assert (await turn(name, (*prompt, *answer, 5, 6)))[0] == 64  # 53 + 20 tokens, in full blocks of 16
    assert (await turn(name, prompt))[0] == 48
    assert (await turn(None, prompt))[0] == 0
    assert (await turn(name, prompt, "another"))[0] == 0
    assert read_metrics(tiny_stack.engines[0])["vllm:prefix_cache_hits_total"] == before + 64 + 48
