"""Keys and records that services share in Valkey, and the one way to read them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from loraplex_adapter_store.repository.engines import EngineHoldings
from loraplex_client._connection import Connection
from loraplex_client.cli.registered import registered_engines
from loraplex_client.valkey_access import ValkeyAccess
from loraplex_common.registry import (
    ENGINES_KEY,
    EngineRecord,
    EngineRecordError,
    RegistryReader,
    claim_key,
    engine_key,
    hints_key,
)
from loraplex_common.valkey import connect

GOOD = EngineRecord(
    engine_id="e-1",
    target="127.0.0.1:8520",
    base_model="tiny",
    base_fingerprint="ab" * 32,
    base_aliases=("acme/tiny",),
    max_model_len=512,
    vocab_size=384,
    num_pages=64,
    block_tokens=16,
    page_bytes=65536,
    max_image_pages=32,
)
FIELDS: dict[str, Any] = json.loads(GOOD.to_json())
# Any JSON, and any record with any JSON in the place of one of its fields.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NEAR = st.builds(lambda name, value: FIELDS | {name: value}, st.sampled_from(sorted(FIELDS)), JSON)
LACKING = st.sampled_from(sorted(FIELDS)).map(lambda name: {k: v for k, v in FIELDS.items() if k != name})
DEEP = st.just(b"[" * 100_000)
BLOBS = st.binary() | (JSON | NEAR | LACKING).map(lambda value: json.dumps(value).encode()) | DEEP


class ValkeyDouble:
    """Answers like a registry with one good engine and others that may be anything."""

    def __init__(self, members: list[bytes], values: list[bytes | None]) -> None:
        self._members = [*members, GOOD.engine_id.encode()]
        self._values = dict(zip(members, values, strict=True)) | {GOOD.engine_id.encode(): GOOD.to_json().encode()}

    async def zrangebyscore(self, *_: object) -> list[bytes]:
        return self._members

    async def mget(self, keys: list[str]) -> list[bytes | None]:
        prefix = len(engine_key(""))
        return [self._values[key[prefix:].encode()] for key in keys]


def test_an_engine_record_survives_json() -> None:
    assert EngineRecord.from_json(GOOD.to_json()) == GOOD


def test_fields_of_a_newer_version_are_ignored() -> None:
    newer = json.dumps(FIELDS | {"color": "blue"})

    assert EngineRecord.from_json(newer.encode()) == GOOD


@given(BLOBS)
def test_a_record_is_read_whole_or_refused_as_unreadable(blob: bytes) -> None:
    try:
        record = EngineRecord.from_json(blob)
    except EngineRecordError:
        return

    assert EngineRecord.from_json(record.to_json()) == record
    assert "".join((record.engine_id, record.target, record.base_model, *record.base_aliases)).isprintable()
    assert all(type(value) is int and value >= 0 for value in (record.max_model_len, record.num_pages))


@given(st.dictionaries(st.binary(min_size=1, max_size=8), st.none() | BLOBS, max_size=4))
def test_whatever_lies_in_the_registry_takes_away_only_itself(entries: dict[bytes, bytes | None]) -> None:
    entries.pop(GOOD.engine_id.encode(), None)
    reader = RegistryReader(ValkeyDouble(list(entries), list(entries.values())))

    records = asyncio.run(reader.read())

    assert records[GOOD.engine_id] == GOOD
    assert all(record.engine_id == engine_id for engine_id, record in records.items())


async def test_an_unreadable_record_is_logged_once_with_its_cause() -> None:
    reader = RegistryReader(ValkeyDouble([b"odd", b"\xff"], [b"{}", b"{}"]))

    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            await reader.read()

    assert sorted((line["engine_id"], line["cause"][:20]) for line in lines) == [
        ("odd", "engine_id is missing"),
        ("\ufffd", "'utf-8' codec can't d"[:20]),
    ]


@pytest.mark.parametrize("score_s", [-1.0, 60.0])
async def test_every_reader_passes_over_engines_whose_lease_ran_out_and_records_that_are_none(
    valkey_url: str, score_s: float
) -> None:
    client = connect(valkey_url)
    other = replace(GOOD, engine_id="e-2", target="127.0.0.1:2")
    strange = {"engine_id": "e-3", "target": 7}
    for engine_id, text, good_for_s in (
        ("e-1", GOOD.to_json(), score_s),
        ("e-2", other.to_json(), 60.0),
        ("e-3", json.dumps(strange), 60.0),
    ):
        await client.set(engine_key(engine_id), text)
        await client.zadd(ENGINES_KEY, {engine_id: time.time() + good_for_s})

    found = {record.engine_id for record in await EngineHoldings(client).registered()}
    targets = set(await registered_engines(ValkeyAccess(url=valkey_url), Connection(target="")))
    await client.aclose()

    expected = {"e-2": other.target} | ({"e-1": GOOD.target} if score_s > 0 else {})
    assert (found, targets) == (set(expected), set(expected.values()))


def test_the_registry_is_read_in_one_place_and_written_in_one() -> None:
    root = Path(__file__).parents[3]
    users = {
        path.name
        for folder in ("services", "clients")
        for path in (root / folder).rglob("*.py")
        if "ENGINES_KEY" in path.read_text()
    }

    assert users == {"registry.py", "registration.py"}


NAMES = st.text(st.sampled_from("ab:1"), min_size=1, max_size=8)


@given(one=st.tuples(NAMES, NAMES), other=st.tuples(NAMES, NAMES))
def test_no_two_claims_have_one_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert claim_key("team", "prod:77") != claim_key("team:prod", "77")
    assert (claim_key(*one) == claim_key(*other)) == (one == other)


def test_keys_are_distinct_and_prefixed() -> None:
    keys = {engine_key("x"), hints_key("x"), claim_key("tenant", "x")}

    assert len(keys) == 3
    assert all(key.startswith("loraplex:") for key in keys)
