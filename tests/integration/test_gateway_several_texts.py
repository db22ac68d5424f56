"""Several adapters of one request that bring texts: one's apply to all, different ones are refused, over a real store."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from google.protobuf.json_format import ParseDict
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import InvalidParameterError
from loraplex_common.rpc_errors import error_from_rpc
from support.adapter_texts import POET, files_with, pirate_texts
from support.adapters import Recipe, adapter_files
from support.gateway_rig import MODEL_NAME, Rig, running_gateway
from support.store_rig import new_id, running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "the quick"}]


@asynccontextmanager
async def world(redis_url: str, valkey_url: str) -> AsyncIterator[Rig]:
    """Run a gateway over a store that has the adapters plain, other, pirate, poet and called, which tokens activate."""
    async with running_rig(store_config(redis_url)) as (store, client):
        await client.upload_recipe("plain")
        await client.upload("other", files_with({}, Recipe(seed=3)))
        await client.upload("pirate", files_with(pirate_texts(), Recipe(seed=1)))
        await client.upload("poet", files_with({"chat_template.jinja": POET.encode()}, Recipe(seed=2)))
        called = Recipe(seed=4, config={"alora_invocation_tokens": [5, 6]})
        await client.upload("called", adapter_files(tiny_base_dir(), called))
        options: dict[str, Any] = {"allow_request_chat_template": True}
        async with running_gateway(valkey_url, store_target=f"127.0.0.1:{store.grpc_port}", **options) as rig:
            yield rig


def request_of(*names: str, **fields: Any) -> gateway_pb2.GenerateRequest:
    adapters = [{"name": name, "weight": 0.5} for name in names]
    fields.setdefault("messages", {"messages": MESSAGES})
    fields.setdefault("stopping", {"max_new_tokens": 2})
    return ParseDict({"request_id": new_id(), "adapters": adapters, **fields}, gateway_pb2.GenerateRequest())


async def submitted(rig: Rig, request: gateway_pb2.GenerateRequest) -> Any:
    await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request), timeout=20)
    return next(submit for submit in rig.engine.submits if submit.request_id == request.request_id)


async def refused(rig: Rig, request: gateway_pb2.GenerateRequest) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submitted(rig, request)
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidParameterError)
    return error.message


async def test_the_texts_of_the_only_one_that_brings_some_apply_to_all(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as rig:
        for name in ("pirate", "poet"):
            alone = await submitted(rig, request_of(name))
            for names in ((name, "plain"), ("plain", "other", name)):
                several = await submitted(rig, request_of(*names))
                assert several.prompt_token_ids == alone.prompt_token_ids
                several.sampling.seed = alone.sampling.seed
                assert several.sampling == alone.sampling
                assert several.stopping == alone.stopping
        base, plain = await submitted(rig, request_of()), await submitted(rig, request_of("plain", "other"))
        assert plain.prompt_token_ids == base.prompt_token_ids != alone.prompt_token_ids


async def test_different_ones_are_refused_until_the_request_says_it_itself(redis_url: str, valkey_url: str) -> None:
    async with world(redis_url, valkey_url) as rig:
        message = await refused(rig, request_of("pirate", "plain", "poet"))
        assert "adapters 'pirate' and 'poet' bring different chat templates" in message
        text = await submitted(rig, request_of("pirate", "poet", messages=None, text="the quick"))
        assert len(text.more_adapters) == 1
        assert text.sampling.temperature == 0.25  # pirate's, which nothing contradicts

        body = {"model": MODEL_NAME, "messages": MESSAGES, "adapters": [{"name": "pirate"}, {"name": "poet"}]}
        async with httpx.AsyncClient(base_url=rig.http) as http:
            answer = await http.post("/v1/chat/completions", json=body)
            own = await http.post("/v1/chat/completions", json={**body, "chat_template": POET, "max_tokens": 2})
            counted = await http.post("/tokenize", json=body)
        assert answer.status_code == counted.status_code == 400
        assert answer.json()["error"]["param"] == counted.json()["error"]["param"] == "adapters"
        assert "send chat_template" in answer.json()["error"]["message"]
        assert own.status_code == 200, own.text


async def test_one_that_tokens_activate_is_refused_among_several_and_served_alone(
    redis_url: str, valkey_url: str
) -> None:
    prompt = {"messages": None, "token_ids": {"ids": [9, 5, 6, 7]}}
    async with world(redis_url, valkey_url) as rig:
        message = await refused(rig, request_of("plain", "called", **prompt))
        assert "adapters[1].name: adapter 'called' is activated by tokens of the prompt" in message

        alone = await submitted(rig, request_of("called", **prompt))
        assert (alone.adapter_start, alone.adapter_scale) == (1, 0.5)
