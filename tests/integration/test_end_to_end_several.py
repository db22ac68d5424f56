"""Several adapters of one request through the whole stack: the sum that peft computes, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_client import AsyncClient, Started
from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.grpc_channel import open_channel
from support.adapters import Recipe, write_adapter
from support.cut_streams import read_up_to, rest_of
from support.generation import PROMPT, greedy, read_tokens, start
from support.oracle import Comparison
from support.stack import Stack, assert_idle, running_stack
from support.stack_fixtures import TINY_RECIPES, import_all
from support.weighted_oracle import WeightedOracle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.integration

Pairs = list[tuple[str, float]]
MIXTURES: list[Pairs] = [
    [("tiny-a", 0.5), ("tiny-b", 0.5)],
    [("tiny-b", 0.5), ("tiny-a", 0.5)],
    [("tiny-a", 1.0), ("tiny-e", 0.25), ("tiny-d", 2.0)],
    [("tiny-c", 3.0), ("tiny-d", 0.75)],
    [("tiny-a", 0.3), ("tiny-b", 0.3), ("tiny-c", 0.3), ("tiny-d", 0.3), ("tiny-e", 0.3)],
    [("tiny-b", 0.0), ("tiny-c", 1.5)],
    [("tiny-e", 1.0)],
]
LONG = 300


@pytest.fixture(scope="module")
def oracle(tiny_world: tuple[Path, Path]) -> WeightedOracle:
    model, root = tiny_world
    return WeightedOracle(model, {name: root / name for name in TINY_RECIPES})


@pytest.fixture
async def client(tiny_stack: Stack) -> AsyncIterator[AsyncClient]:
    import_all(tiny_stack)
    client = tiny_stack.client()
    yield client
    await client.close()
    await assert_idle(tiny_stack.engines[0])


async def several(client: AsyncClient, pairs: Pairs, max_new_tokens: int = 24, **options: Any) -> list[int]:
    return await greedy(client, None, max_new_tokens, adapters=pairs, **options)


def check(oracle: WeightedOracle, outputs: Sequence[tuple[Pairs, Sequence[int]]]) -> None:
    comparison = Comparison()
    for pairs, tokens in outputs:
        oracle.compare(comparison, PROMPT, tokens, dict(pairs))
    comparison.check()


async def test_each_mixture_is_pefts_weighted_sum_beside_strangers(client: AsyncClient, oracle: WeightedOracle) -> None:
    strangers = [None, *TINY_RECIPES]
    alone = [await greedy(client, name, 24) for name in strangers]

    outputs = await asyncio.gather(
        *(several(client, pairs) for pairs in MIXTURES), *(greedy(client, name, 24) for name in strangers)
    )

    mixed, beside = outputs[: len(MIXTURES)], outputs[len(MIXTURES) :]

    check(oracle, [*zip(MIXTURES, mixed, strict=True)])
    assert beside == alone
    assert len({tuple(tokens) for tokens in mixed}) > len(MIXTURES) // 2  # weights and choice of adapters count
    assert mixed == [await several(client, pairs) for pairs in MIXTURES]  # and company does not


async def test_a_list_of_one_is_its_adapter_and_weights_of_zero_are_the_base(client: AsyncClient) -> None:
    assert await several(client, [("tiny-b", 0.5)]) == await greedy(client, "tiny-b", 24, adapter_scale=0.5)
    assert await several(client, [("tiny-b", 0.0), ("tiny-c", 0.0)]) == await greedy(client, None, 24)


async def test_scores_are_those_of_the_sum(tiny_stack: Stack, client: AsyncClient, oracle: WeightedOracle) -> None:
    pairs = MIXTURES[2]
    async with httpx.AsyncClient(base_url=f"http://{tiny_stack.gateway.addresses['http']}") as http:
        body = {
            "model": "tiny",
            "adapters": [{"name": name, "weight": weight} for name, weight in pairs],
            **{"prompt": list(PROMPT), "max_tokens": 0, "echo": True, "logprobs": 0},
        }
        answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    scores = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]

    logits = oracle.weighted_logits(PROMPT, dict(pairs)).astype("float64")
    for position, score in enumerate(scores):
        row = logits[position]
        shifted = row - row.max()
        assert score == pytest.approx(shifted[PROMPT[position + 1]] - _log_sum(shifted), abs=1e-3)


def _log_sum(row: Any) -> float:
    import numpy as np

    return float(np.log(np.exp(row).sum()))


async def test_a_cut_stream_is_resumed_where_it_was(tiny_stack: Stack, client: AsyncClient) -> None:
    pairs = MIXTURES[2]
    whole = await several(client, pairs, 200)
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=PROMPT),
        adapters=[gateway_pb2.WeightedAdapter(name=name, weight=weight) for name, weight in pairs],
        sampling=gateway_pb2.SamplingParams(temperature=0.0),
        stopping=gateway_pb2.StoppingParams(max_new_tokens=200, ignore_eos=True),
        request_id="several-cut",
    )
    async with open_channel(tiny_stack.gateway.grpc) as channel:
        stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(request)
        got = await read_up_to(call, request, 10)
        call.cancel()
        rest = await rest_of(stub.Generate(got.resumed(), timeout=60))

    assert [*got.token_ids, *(token for response in rest for token in response.chunk.token_ids)] == whole
    assert rest[0].started.adapter_revisions == got.started.adapter_revisions


@pytest.fixture(scope="module")
def fragile_stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("several"), *tiny_world) as stack:
        yield stack


async def test_another_engine_goes_on_where_a_killed_one_stopped(fragile_stack: Stack) -> None:
    stack = fragile_stack
    import_all(stack)
    mixtures = MIXTURES[1:4]
    async with stack.client() as client:
        alone = [await several(client, pairs, LONG) for pairs in mixtures]
        doomed = stack.engines[-1]
        streams = [start(client, None, LONG, adapters=pairs) for pairs in mixtures]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        running = [asyncio.create_task(read_tokens(stream)) for stream in streams]
        await asyncio.to_thread(stack.start_engine)

        doomed.kill()

        assert await asyncio.gather(*running) == alone
    stack.engines.remove(doomed)


async def test_one_that_multiplies_is_refused_among_several_by_name(
    tiny_stack: Stack, client: AsyncClient, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "scaled", tiny_stack.model, Recipe(seed=9))
    _as_dora(folder)
    await client.adapters.upload("several-dora", folder)
    try:
        with pytest.raises(LoraplexError) as caught:
            await several(client, [("tiny-a", 0.5), ("several-dora", 0.5)])
        assert isinstance(caught.value, InvalidParameterError)
        assert caught.value.field is not None
        assert caught.value.field.startswith("adapters")
        assert len(await several(client, [("several-dora", 1.0)])) == 24
    finally:
        await client.adapters.delete("several-dora")


def _as_dora(folder: Path) -> None:
    """Make an adapter one with DoRA's magnitudes, which are c."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    tensors = load_file(folder / "adapter_model.safetensors")
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): tensor.norm(dim=1).abs() + 1.0
        for name, tensor in tensors.items()
        if "lora_B" in name
    }
    save_file({**tensors, **magnitudes}, folder / "adapter_model.safetensors")
