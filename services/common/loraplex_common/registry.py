"""Keys in Valkey that more than one service reads, and the records behind them.

Everything else in Valkey belongs to one service, which keeps its key names to itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Final

from loraplex_common.version import package_version

ENGINES_KEY: Final = "loraplex:engines"
"""Sorted set of engine ids, scored by lease expiry (unix seconds). An engine past its score is gone."""

ENGINE_LEASE_S: Final = 10.0
ENGINE_RENEW_S: Final = 2.0


def engine_key(engine_id: str) -> str:
    """String key of an engine's record (`EngineRecord` JSON), expiring with its lease."""
    return f"loraplex:engine:{engine_id}"


def hints_key(engine_id: str) -> str:
    """Capped stream of prefetch and eviction hints for one engine: fields ``kind``, ``revision``, ``wanted_in_ms``."""
    return f"loraplex:hints:{engine_id}"


def claim_key(tenant: str, request_id: str) -> str:
    """String key that claims (tenant, request_id) for one gateway while the request runs."""
    return f"loraplex:claim:{tenant}:{request_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """How gateways find an engine and know what it serves.

    Attributes:
        target: gRPC target, ``host:port``.
        base_model: Served name of the base model.
        max_image_pages: Largest adapter image the pool can ever hold.
        is_draining: True once it takes no new requests.
    """

    engine_id: str
    target: str
    base_model: str
    base_fingerprint: str
    base_aliases: tuple[str, ...] = ()
    max_model_len: int
    vocab_size: int
    num_pages: int
    block_tokens: int
    page_bytes: int
    max_image_pages: int
    is_draining: bool = False
    version: str = field(default_factory=package_version)

    def to_json(self) -> str:
        """Encode for Valkey."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, data: str | bytes) -> EngineRecord:
        """Decode what `to_json` wrote; fields of a newer version are ignored."""
        fields = json.loads(data)
        known = {k: v for k, v in fields.items() if k in cls.__dataclass_fields__}
        return cls(**{**known, "base_aliases": tuple(known.get("base_aliases", ()))})
