"""A gateway's /metrics: its engines as one, adapters by name, and no more than its reader may know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from loraplex_common.secret import Secret
from prometheus_client.parser import text_string_to_metric_families
from support import routers
from support.gateway_rig import DIGEST, OTHER_DIGEST, Rig, running_gateway, text_request

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


async def read(rig: Rig, **headers: str) -> str:
    async with httpx.AsyncClient() as client:
        answer = await client.get(rig.metrics, headers=headers)
    assert answer.status_code == 200
    return answer.text


def samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    found = text_string_to_metric_families(text)
    return [(s.labels, s.value) for family in found for s in family.samples if s.name == name]


async def test_a_router_sees_the_gateways_engines_as_one_and_their_adapters_by_name(valkey_url: str) -> None:
    where = {0: {DIGEST}, 1: {OTHER_DIGEST}}
    async with running_gateway(valkey_url, num_engines=2, resident_on=where) as rig:
        for engine, load in zip(rig.engines, (3, 4), strict=True):
            engine.extra_load = load
            engine.notify()
        async for _ in rig.stub.Generate(text_request(adapter="poet")):
            pass  # a message of each engine's session carries its load
        text = await read(rig)

        for router in (routers.gaie, routers.llm_d):
            state = router(text)
            assert state.running >= 3
            assert state.num_blocks == 128
            assert state.affinity("poet") == state.affinity("poet:prod") == 1.0
            assert state.affinity("secret") < 1.0
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:lora_requests_info"):
        ((labels, _),) = samples(text, name)
        assert (labels["model_name"], labels["engine"]) == ("tiny", "all")


async def test_an_adapter_that_requests_wait_for_is_listed_as_waiting(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 0
        call = rig.stub.Generate(text_request(adapter="poet"))
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 1)

        state = routers.llm_d(await read(rig))

        assert (state.active, state.waiting) == (set(), {"poet"})
        rig.engine.release()
        async for _ in call:
            pass


async def test_restricted_adapters_are_named_only_to_those_with_the_metrics_key(valkey_url: str) -> None:
    async with running_gateway(valkey_url, resident_on={0: {DIGEST}}, metrics_key=Secret("k")) as rig:
        everybody = await read(rig)
        insider = await read(rig, Authorization="Bearer k")
        async with httpx.AsyncClient() as client:
            guess = await client.get(rig.metrics, headers={"Authorization": "Bearer guess"})

    assert routers.llm_d(everybody).active == {"poet"}
    assert routers.llm_d(insider).active == {"poet", "secret"}
    assert "secret" not in everybody
    assert guess.status_code == 401


async def test_tenants_and_what_they_use_are_shown_only_to_administrators_and_scrapers(
    valkey_url: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-vip vip\nkey-ops ops admin\nkey-scraper prometheus metrics\n")
    options = {"api_key": "key-vip"}
    async with running_gateway(valkey_url, api_keys_file=keys, channel_options=options) as rig:
        async for _ in rig.stub.Generate(text_request(adapter="secret")):
            pass
        everybody = await read(rig)
        tenant_itself = await read(rig, Authorization="Bearer key-vip")
        insiders = [await read(rig, Authorization=f"Bearer {key}") for key in ("key-ops", "key-scraper")]

    for text in (everybody, tenant_itself):
        assert "vip" not in text
        assert "secret" not in text
    shown = [(everybody, "other", "other"), *((text, "secret", "vip") for text in insiders)]
    for text, adapter, tenant in shown:
        ((labels, count),) = samples(text, "loraplex_gateway_requests_total")
        assert (labels["adapter"], count) == (adapter, 1)
        tokens = {labels["kind"]: labels["tenant"] for labels, _ in samples(text, "loraplex_gateway_tokens_total")}
        assert tokens == dict.fromkeys(("input", "output", "cached"), tenant)


async def test_the_choices_of_a_call_are_counted_once_and_a_refused_call_is_none_of_vllms(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        async with httpx.AsyncClient(base_url=rig.http) as client:
            body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "n": 3}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert (await client.post("/v1/completions", json=body | {"model": "nobody"})).status_code == 404
        text = await read(rig)

    ((_, calls),) = samples(text, "vllm:request_params_n_count")
    ((_, choices),) = samples(text, "vllm:request_params_n_sum")
    assert (calls, choices) == (1, 3)
    assert sum(count for _, count in samples(text, "vllm:request_success_total")) == 3
    ((_, generated),) = samples(text, "vllm:generation_tokens_total")
    assert generated == 12
    ((_, gaps),) = samples(text, "vllm:inter_token_latency_seconds_count")
    assert gaps == 9


async def test_the_public_port_shows_no_metrics_and_says_where_they_are(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as client:
        answer = await client.get(f"{rig.http}/metrics")

        assert answer.status_code == 404
        assert f"port {rig.app.metrics_port} (--metrics-port)" in answer.text
        assert "loraplex_" not in answer.text
        assert "loraplex_gateway_requests_total" in await read(rig)
