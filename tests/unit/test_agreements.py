"""Rules that two parts hold and neither may import from the other: here they are compared."""

from __future__ import annotations

import dataclasses
from typing import Any

from loraplex_adapter_store.checkpoint.bounds import MAX_PART_BYTES
from loraplex_adapter_store.config import StoreConfig
from loraplex_client._connection import DEFAULT_STORE_PORT, DEFAULT_TARGET
from loraplex_client._store_messages import CHUNK_BYTES
from loraplex_client.serve import ServeConfig
from loraplex_engine.config import EngineConfig
from loraplex_gateway.config import GatewayConfig


def defaults(config: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


def test_the_client_uploads_in_parts_that_the_store_takes() -> None:
    assert CHUNK_BYTES <= MAX_PART_BYTES


def test_the_client_looks_for_the_servers_where_they_listen() -> None:
    gateway, store, engine, stack = map(defaults, (GatewayConfig, StoreConfig, EngineConfig, ServeConfig))

    assert f"127.0.0.1:{gateway['port']}" == DEFAULT_TARGET
    assert store["port"] == DEFAULT_STORE_PORT
    assert [gateway["port"], gateway["http_port"], gateway["metrics_port"]] == [
        stack["grpc_port"],
        stack["http_port"],
        stack["metrics_port"],
    ]
    assert [store["port"], store["metrics_port"]] == [stack["store_port"], stack["store_metrics_port"]]
    assert [engine["port"], engine["metrics_port"]] == [stack["engine_port"], stack["engine_metrics_port"]]
