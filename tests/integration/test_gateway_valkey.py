"""Valkey takes no writes: leases run out although their engines live, and no request is refused for it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.base_model import load_base_model
from loraplex_common.registry import ENGINES_KEY, engine_key
from loraplex_common.valkey import connect
from loraplex_gateway.app import GatewayApp
from loraplex_gateway.engines import liveness, registry_watcher
from support.engine_double import EngineDouble
from support.gateway_rig import Rig, letters, make_config, model_directory, running_gateway, text_request
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest


async def forget(rig: Rig) -> None:
    """Take the engine out of the registry, as a lease that no engine renews does."""
    await rig.valkey.zadd(ENGINES_KEY, {rig.engine.engine_id: time.time() - 1})
    await rig.valkey.delete(engine_key(rig.engine.engine_id))


async def test_an_engine_whose_session_is_open_serves_on_after_its_lease_and_a_silent_one_does_not(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "PROOF_S", 2.0)
    async with running_gateway(valkey_url) as rig:
        await forget(rig)
        deadline = time.monotonic() + 3 * registry_watcher.POLL_S
        while time.monotonic() < deadline:
            response = await rig.stub.GenerateOnce(Once(request=text_request()))
            assert response.finished.usage.output_tokens == 8

        rig.engine.is_silent = True
        await eventually(lambda: not rig.app.pool.links)


async def test_an_engine_is_gone_once_its_lease_and_its_session_are(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        await forget(rig)
        await asyncio.sleep(2 * registry_watcher.POLL_S)
        assert rig.app.pool.has_candidate

        await rig.engine.kill()

        await eventually(lambda: not rig.app.pool.links)


async def test_a_gateway_that_starts_while_no_lease_can_be_renewed_finds_the_engines_that_live(tmp_path: Path) -> None:
    base = load_base_model(model_directory())
    living, dead = (EngineDouble(base=base, reply=letters) for _ in range(2))
    with running_server(tmp_path) as server:
        client = connect(server.url)
        for engine in (living, dead):
            await engine.start()
            await client.set(engine_key(engine.engine_id), engine.record().to_json())
            await client.zadd(ENGINES_KEY, {engine.engine_id: time.time() - 60})
        await dead.kill()
        await client.config_set("min-replicas-to-write", 1)  # writes are refused, as on a full disk
        app = GatewayApp(make_config(server.url))
        try:
            await app.start()
            await eventually(lambda: app.is_ready)

            await client.config_set("min-replicas-to-write", 0)

            await eventually(lambda: {s.engine_id for s in app.pool.links} == {living.engine_id})
            assert app.is_ready
        finally:
            await app.close()
            await living.kill()
            await client.aclose()
