"""Keys and records that services share in Valkey."""

from __future__ import annotations

import json

from loraplex_common.registry import EngineRecord, claim_key, engine_key, hints_key


def make_record() -> EngineRecord:
    return EngineRecord(
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


def test_an_engine_record_survives_json() -> None:
    assert EngineRecord.from_json(make_record().to_json()) == make_record()


def test_fields_of_a_newer_version_are_ignored() -> None:
    newer = json.dumps(json.loads(make_record().to_json()) | {"color": "blue"})

    assert EngineRecord.from_json(newer.encode()) == make_record()


def test_keys_are_distinct_and_prefixed() -> None:
    keys = {engine_key("x"), hints_key("x"), claim_key("tenant", "x")}

    assert len(keys) == 3
    assert all(key.startswith("loraplex:") for key in keys)
