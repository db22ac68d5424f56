"""What the registry says, and what is believed when it says nothing."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from loraplex_common.errors import StoreUnavailableError
from loraplex_common.registry import EngineRecord
from loraplex_gateway.engines import registry_watcher
from loraplex_gateway.engines.registry_watcher import RegistryWatcher
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest
    from loraplex_gateway.engines.pool import EnginePool
    from redis.asyncio import Redis

RECORD = EngineRecord(
    engine_id="e1",
    target="127.0.0.1:1",
    base_model="tiny",
    base_fingerprint="00" * 32,
    max_model_len=512,
    vocab_size=384,
    num_pages=64,
    block_tokens=16,
    page_bytes=65536,
    max_image_pages=32,
)


class ValkeyDouble:
    """Holds records as text; None means that it is down."""

    def __init__(self) -> None:
        self.records: dict[str, str] | None = {}

    async def zrangebyscore(self, _key: str, _low: object, high: object) -> list[bytes]:
        if self.records is None:
            raise StoreUnavailableError("down")
        if high != "+inf":
            return []  # of leases that ran out
        return [engine_id.encode() for engine_id in self.records]

    async def mget(self, keys: list[str]) -> list[bytes]:
        assert self.records is not None
        return [self.records[key.rpartition(":")[2]].encode() for key in keys]


class PoolDouble:
    def __init__(self) -> None:
        self.listed: set[str] = set()

    def sync(self, records: Mapping[str, EngineRecord]) -> None:
        self.listed = set(records)


def make() -> tuple[RegistryWatcher, ValkeyDouble, PoolDouble]:
    valkey, pool = ValkeyDouble(), PoolDouble()
    return RegistryWatcher(cast("Redis", valkey), cast("EnginePool", pool)), valkey, pool


async def test_an_engine_is_gone_once_it_is_no_longer_listed() -> None:
    watcher, valkey, pool = make()
    valkey.records = {"e1": RECORD.to_json()}
    await watcher.poll_once()
    assert pool.listed == {"e1"}

    valkey.records = {}
    await watcher.poll_once()

    assert pool.listed == set()


async def test_leases_that_ran_out_while_valkey_was_away_get_time_to_be_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry_watcher, "ENGINE_LEASE_S", 0.2)
    watcher, valkey, pool = make()
    valkey.records = {"e1": RECORD.to_json(), "e2": replace(RECORD, engine_id="e2").to_json()}
    await watcher.poll_once()
    valkey.records = None
    await watcher.poll_once()
    assert pool.listed == {"e1", "e2"}

    valkey.records = {"e2": replace(RECORD, engine_id="e2").to_json()}
    await watcher.poll_once()
    assert pool.listed == {"e1", "e2"}

    polling = asyncio.create_task(watcher.run())
    await eventually(lambda: pool.listed == {"e2"})
    polling.cancel()


async def test_a_record_that_cannot_be_read_takes_away_only_itself() -> None:
    watcher, valkey, pool = make()
    valkey.records = {"e1": RECORD.to_json(), "odd": "no JSON", "short": json.dumps({"engine_id": "short"}), "n": "1"}

    await watcher.poll_once()

    assert pool.listed == {"e1"}


def test_fields_of_a_newer_version_are_ignored() -> None:
    fields: dict[str, Any] = json.loads(RECORD.to_json())

    assert EngineRecord.from_json(json.dumps({**fields, "novelty": 1})) == RECORD
