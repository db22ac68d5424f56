"""A gateway and a real store for tests of what administrators do over HTTP; there is no engine."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from loraplex_common.secret import Secret
from loraplex_gateway.app import GatewayApp
from support.adapters import Recipe, adapter_files
from support.gateway_rig import make_config
from support.hub_double import HubDouble, running_hub
from support.store_rig import StoreClient, running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_gateway.config import GatewayConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEYS = "key-ops ops admin\nkey-me me\nkey-gateway gateway-1 gateway\n"


@dataclass
class AdminRig:
    """A gateway and a store, and a client of each."""

    app: GatewayApp
    store: StoreClient
    http: httpx.AsyncClient
    root: Path
    hub: HubDouble

    def folder(self, name: str, seed: int = 0, base: Path | None = None) -> str:
        """Write an adapter below the import root."""
        folder = self.root / name
        folder.mkdir()
        for file, data in adapter_files(base or tiny_base_dir(), Recipe(seed=seed)).items():
            (folder / file).write_bytes(data)
        return str(folder)

    async def load(
        self, name: str = "json", *, key: str = "", over: httpx.AsyncClient | None = None, **body: Any
    ) -> httpx.Response:
        headers, http = {"idempotency-key": key} if key else {}, over or self.http
        return await http.post("/v1/load_lora_adapter", json={"lora_name": name, **body}, headers=headers)

    async def unload(self, name: str = "json", **body: Any) -> httpx.Response:
        return await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name, **body})

    async def root_of(self, name: str) -> str:
        answer = await self.http.get(f"/v1/models/{name}")
        return str(answer.json().get("root") or answer.json()["error"]["code"])

    @asynccontextmanager
    async def another_gateway(self) -> AsyncIterator[httpx.AsyncClient]:
        """Run a further gateway of the same store, and yield a client of it."""
        async with _serving(self.app.config) as (_, http):
            yield http


@asynccontextmanager
async def running(redis_url: str, tmp_path: Path, *, keys: str = KEYS, **gateway: Any) -> AsyncIterator[AdminRig]:
    keys_file, root = tmp_path / "keys", tmp_path / "imports"
    keys_file.write_text(keys)
    root.mkdir()
    hub = HubDouble("org/adapter", COMMIT, adapter_files(tiny_base_dir(), Recipe(seed=9)))
    identity: dict[str, Any] = {"api_keys_file": keys_file, "peer_api_key": Secret("key-gateway")} if keys else {}
    store_keys = keys_file if keys else None
    with running_hub(hub):
        config = store_config(redis_url, import_root=(root,), hf_endpoint=hub.url, api_keys_file=store_keys)
        async with running_rig(config, api_key="key-ops") as (store, client):
            target = f"127.0.0.1:{store.grpc_port}"
            flags = {"model": (tiny_base_dir(),), "store_target": target, **identity, **gateway}
            async with _serving(make_config(redis_url, **flags)) as (app, http):
                yield AdminRig(app, client, http, root, hub)


@asynccontextmanager
async def _serving(config: GatewayConfig) -> AsyncIterator[tuple[GatewayApp, httpx.AsyncClient]]:
    """Run a gateway, and yield it with an administrator's client."""
    app = GatewayApp(config)
    try:
        await app.start()
        url, headers = f"http://127.0.0.1:{app.http_port}", {"authorization": "Bearer key-ops"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
            yield app, http
    finally:
        await app.close()
