"""What each stage of an import reaches by itself: reading the file, checking it, hashing it, and writing it to Valkey."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import redis
from loraplex_adapter_store.checkpoint.reader import read_checkpoint

from loraplex_bench.store.peers import best_rate

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.base_model import BaseModelInfo

CHUNK_BYTES = 2 << 20


def stage_rates(directory: Path, base: BaseModelInfo, url: str) -> dict[str, float]:
    """Return the rates of the stages by name, in GB/s.

    Args:
        directory: An adapter, in the page cache.
        base: Its base model.
        url: A Valkey that writes its append-only file as the store's does.
    """
    config = (directory / "adapter_config.json").read_bytes()
    weights = (directory / "adapter_model.safetensors").read_bytes()
    num_bytes = len(weights)
    room = np.ones(num_bytes, dtype=np.uint8).data

    def read() -> None:
        with (directory / "adapter_model.safetensors").open("rb", buffering=0) as file:
            assert file.readinto(room) == num_bytes

    def write() -> None:
        for start in range(0, num_bytes, CHUNK_BYTES):
            client.set(f"bench:{start}", weights[start : start + CHUNK_BYTES])

    with redis.Redis.from_url(url) as client:
        found = {
            "read of the file": best_rate(num_bytes, read),
            "check": best_rate(num_bytes, lambda: read_checkpoint(config, weights, base)),
            "sha256 in one thread": best_rate(num_bytes, lambda: hashlib.sha256(weights).digest()),
            "redis-py SET/1 connection": best_rate(num_bytes, write),
        }
        client.unlink(*(f"bench:{start}" for start in range(0, num_bytes, CHUNK_BYTES)))
    return found
