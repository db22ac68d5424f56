"""Requests that name an adapter by its source: a gateway, a real store, a hub on loopback and an engine double."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_adapter_store.resolve.rules import ResolveRule
from loraplex_common.base_model import load_base_model
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_common.secret import Secret
from support.adapters import Recipe, adapter_files
from support.gateway_rig import Rig, running_gateway
from support.hub_double import HubDouble, running_hub
from support.store_rig import StoreClient, running_rig, store_config, tiny_base_dir
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.errors import LoraplexError

pytestmark = pytest.mark.integration
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE, WEIGHTS = f"hf:acme/poet@{COMMIT}", "adapter_model.safetensors"
KEYS = "key-ops ops admin\nkey-red red\nkey-blue blue\nkey-gateway gateway-1 gateway\n"


class GatedHub(HubDouble):
    """A hub whose weights come once they may."""

    def __init__(self) -> None:
        super().__init__("acme/poet", COMMIT, adapter_files(tiny_base_dir(), Recipe(seed=3)))
        self.may_send = threading.Event()
        self.may_send.set()

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        if path.endswith(WEIGHTS):
            assert self.may_send.wait(30)
        return super().answer(path, authorization)


@dataclass(kw_only=True)
class Sources:
    """What the tests use."""

    rig: Rig
    store: StoreClient
    hub: GatedHub
    http: httpx.AsyncClient

    @property
    def num_fetched(self) -> int:
        return sum(path.endswith(WEIGHTS) for path in self.hub.requests)

    async def complete(self, model: str = SOURCE, *, key: str = "key-red", **body: Any) -> httpx.Response:
        asked = {"model": model, "prompt": "abc", "max_tokens": 4, **body}
        return await self.http.post("/v1/completions", json=asked, headers={"authorization": f"Bearer {key}"})

    async def generate(
        self, adapter: str = SOURCE, *, key: str = "key-red", within_s: float = 20.0, **fields: Any
    ) -> Any:
        """Return the answer of a unary call, or the error behind its status."""
        request = gateway_pb2.GenerateOnceRequest(request=_request(adapter, **fields))
        async with open_channel(f"127.0.0.1:{self.rig.app.grpc_port}", api_key=key) as channel:
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
            try:
                return await stub.GenerateOnce(request, timeout=within_s)
            except grpc.aio.AioRpcError as error:
                return error_from_rpc(error)

    async def started(self, adapter: str = SOURCE, **fields: Any) -> Any:
        """Return how a stream of red's starts, or the error behind its status."""
        async with open_channel(f"127.0.0.1:{self.rig.app.grpc_port}", api_key="key-red") as channel:
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
            try:
                responses = [each async for each in stub.Generate(_request(adapter, **fields), timeout=20)]
            except grpc.aio.AioRpcError as error:
                return error_from_rpc(error)
        return next(each.started for each in responses if each.HasField("started"))


def _request(adapter: str, **fields: Any) -> gateway_pb2.GenerateRequest:
    request = gateway_pb2.GenerateRequest(adapter=adapter, text="abc", **fields)
    request.stopping.max_new_tokens = 4
    return request


@asynccontextmanager
async def running(
    url: str, tmp_path: Path, *rules: str, store: dict[str, Any] | None = None, **gateway: Any
) -> AsyncIterator[Sources]:
    keys, hub = tmp_path / "keys", GatedHub()
    keys.write_text(KEYS)
    parsed = tuple(ResolveRule.parse(rule) for rule in rules or ("hf:acme/",))
    identity = {"api_keys_file": keys, "peer_api_key": Secret("key-gateway")}
    with running_hub(hub):
        config = store_config(url, hf_endpoint=hub.url, resolve_from=parsed, api_keys_file=keys, **store or {})
        async with running_rig(config, api_key="key-ops") as (served, client):
            base = load_base_model(tiny_base_dir())
            flags = {
                "model": (tiny_base_dir(),),
                "store_target": f"127.0.0.1:{served.grpc_port}",
                **identity,
                **gateway,
            }
            async with running_gateway(url, base=base, **flags) as rig, httpx.AsyncClient(base_url=rig.http) as http:
                try:
                    yield Sources(rig=rig, store=client, hub=hub, http=http)
                finally:
                    hub.may_send.set()


async def test_a_burst_over_both_faces_fetches_once_and_runs_on_the_pinned_revision(
    redis_url: str, tmp_path: Path
) -> None:
    async with running(redis_url, tmp_path) as all_of:
        unpinned = SOURCE.partition("@")[0]
        calls = [all_of.complete() for _ in range(8)] + [all_of.complete(unpinned) for _ in range(8)]
        answers, answer = await asyncio.gather(asyncio.gather(*calls), all_of.generate())

        assert {each.status_code for each in answers} == {200}
        assert {each.json()["model"] for each in answers} == {SOURCE, unpinned}
        assert all_of.num_fetched == 1
        (name,) = await all_of.store.names()
        kept = (await all_of.store.get(name)).adapter
        assert list(kept.allowed_tenants) == ["red"]
        assert answer.started.adapter_revision == kept.latest.revision
        assert list(answer.started.adapter_sources) == [SOURCE]
        by_branch = await all_of.generate(unpinned)
        assert (by_branch.started.adapter_revision, *by_branch.started.adapter_sources) == (
            kept.latest.revision,
            SOURCE,
        )
        assert kept.description == f"resolved from {SOURCE}"
        assert {submit.adapter_digest for submit in all_of.rig.engine.submits} == {kept.latest.revision}


async def test_a_source_is_combined_with_a_base_model_weights_and_tokenising(redis_url: str, tmp_path: Path) -> None:
    async with running(redis_url, tmp_path) as all_of:
        together = await all_of.complete(f"tiny|{SOURCE}")
        several = await all_of.complete("tiny", adapters=[{"name": SOURCE, "weight": 0.5}])
        tokens = await all_of.http.post(
            "/tokenize", json={"model": SOURCE, "prompt": "abc"}, headers={"authorization": "Bearer key-red"}
        )

        assert [each.status_code for each in (together, several, tokens)] == [200] * 3, together.text + several.text


async def test_what_one_tenant_has_resolved_is_no_others(redis_url: str, tmp_path: Path) -> None:
    async with running(redis_url, tmp_path, "hf:acme/?tenant=red") as all_of:
        assert (await all_of.complete()).status_code == 200
        (name,) = await all_of.store.names()

        by_source = await all_of.complete(key="key-blue")
        by_name = await all_of.complete(name, key="key-blue")
        listed = await all_of.http.get("/v1/models", headers={"authorization": "Bearer key-blue"})

        assert (by_source.status_code, by_source.json()["error"]["code"]) == (403, "ADAPTER_FORBIDDEN")
        assert by_name.status_code == 404
        assert name not in listed.text


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        (f"hf:acme/none@{COMMIT}", 404, grpc.StatusCode.NOT_FOUND),
        (f"hf:other/poet@{COMMIT}", 403, grpc.StatusCode.PERMISSION_DENIED),
        ("s3://bucket/folder", 403, grpc.StatusCode.PERMISSION_DENIED),
        ("hf:acme/poet@main", 400, grpc.StatusCode.INVALID_ARGUMENT),
        ("hf:acme/../poet", 400, grpc.StatusCode.INVALID_ARGUMENT),
        ("hf:acme/" + "n" * 600, 400, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_cannot_be_resolved_is_refused_by_name_over_both_faces(
    redis_url: str, tmp_path: Path, model: str, status: int, code: grpc.StatusCode
) -> None:
    async with running(redis_url, tmp_path) as all_of:
        over_http, over_grpc = await all_of.complete(model), await all_of.generate(model)

        assert over_http.status_code == status, over_http.text
        assert over_grpc.code is code
        if status == 400:
            assert (over_http.json()["error"]["param"], over_grpc.field) == ("model", "adapter")


async def test_a_request_waits_until_its_own_deadline_and_the_import_goes_on(redis_url: str, tmp_path: Path) -> None:
    async with running(redis_url, tmp_path) as all_of:
        all_of.hub.may_send.clear()
        patient = asyncio.create_task(all_of.generate())
        late: LoraplexError = await all_of.generate(within_s=0.4)
        fast: LoraplexError = await all_of.generate(load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST)
        all_of.hub.may_send.set()

        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (fast.reason, fast.retry_after_s) == ("ADAPTER_LOADING", 2.0)
        assert (await patient).started.adapter_revision
        assert all_of.num_fetched == 1


async def test_requests_that_wait_are_bounded_and_one_tenant_leaves_room_for_others(
    redis_url: str, tmp_path: Path
) -> None:
    async with running(redis_url, tmp_path, max_resolving_requests=4) as all_of:
        all_of.hub.may_send.clear()
        reds = [asyncio.create_task(all_of.complete()) for _ in range(2)]
        await eventually(lambda: all_of.rig.app.sources.num_waiting == 2, what="two wait")
        refused = await all_of.complete()
        blue = asyncio.create_task(all_of.complete(key="key-blue"))
        await eventually(lambda: all_of.rig.app.sources.num_waiting == 3, what="three wait")
        all_of.hub.may_send.set()

        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "retry-after" in refused.headers
        assert [each.status_code for each in await asyncio.gather(*reds, blue)] == [200] * 3


async def test_an_import_beyond_the_tenants_quota_is_refused_with_the_arithmetic(
    redis_url: str, tmp_path: Path
) -> None:
    quotas = tmp_path / "quotas.toml"
    quotas.write_text("[default]\nimports_per_day = 0\n")
    async with running(redis_url, tmp_path, store={"quotas_file": quotas}) as all_of:
        over_http, over_grpc = await all_of.complete(), await all_of.generate()

        assert over_http.status_code == 429
        assert "0 imports a day are allowed" in over_http.json()["error"]["message"]
        assert (over_grpc.reason, over_grpc.exceeded[0].limit) == ("TENANT_QUOTA", "imports_per_day")
        assert all_of.num_fetched == 0


async def test_a_stream_that_began_with_a_source_is_resumed_on_its_revision(redis_url: str, tmp_path: Path) -> None:
    async with running(redis_url, tmp_path) as all_of:
        begun = await all_of.started()
        resume = gateway_pb2.Resume(resume_token=begun.resume_token)

        again = await all_of.started(resume=resume)
        other = await all_of.started("poet", resume=resume)

        assert again.adapter_revision == begun.adapter_revision
        assert other.reason == "RESUME_INVALID"
