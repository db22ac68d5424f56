"""Sends random requests to every operation of the HTTP port: ``python -m support.openapi_campaign --requests 500``."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_common.valkey import EmbeddedValkey
from support.admin_rig import running
from support.gateway_rig import MODEL_NAME, running_gateway
from support.openapi_fuzz import Outcome, fuzz

if TYPE_CHECKING:
    from collections.abc import Callable

ADMIN = {"authorization": "Bearer key-ops"}
MODELS = (MODEL_NAME, "poet", "poet:prod", f"{MODEL_NAME}|poet")


async def fuzz_requests(url: str, *, num_requests: int, draw: int) -> Outcome:
    """Fuzz a gateway with engines: every operation that changes no adapters."""
    ask = partial(fuzz, headers={}, num_requests=num_requests, draw=draw, fills={"model": MODELS})
    return await asyncio.to_thread(ask, url, takes=lambda path: not changes_adapters(path))


async def fuzz_changes(url: str, *, num_requests: int, draw: int) -> Outcome:
    """Fuzz a gateway with a real store, as an administrator: the operations that change adapters."""
    fills = {
        "lora_name": ("json", "sql"),
        "lora_path": ("org/adapter", "org/other", "/etc"),
        "base_model_name": ("tiny",),
    }
    ask = partial(fuzz, headers=ADMIN, num_requests=num_requests, draw=draw, fills=fills)
    return await asyncio.to_thread(ask, url, takes=changes_adapters)


def changes_adapters(path: str) -> bool:
    """Whether a path is one of those that change adapters."""
    return "load_lora_adapter" in path


async def _main(redis_url: Callable[[int], str], folder: Path, *, num_requests: int, draw: int) -> list[Outcome]:
    async with running_gateway(redis_url(1)) as rig:
        requests = await fuzz_requests(rig.http, num_requests=num_requests, draw=draw)
    async with running(redis_url(2), folder) as admin:
        changes = await fuzz_changes(str(admin.http.base_url), num_requests=num_requests, draw=draw)
    return [requests, changes]


def main() -> int:
    """Run; return 1 if an answer was a 5xx."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help="for each operation, valid ones and broken ones each")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        valkey = EmbeddedValkey(Path(folder) / "valkey")
        valkey.start()
        try:
            work = _main(
                lambda number: f"{valkey.url}?db={number}", Path(folder), num_requests=flags.requests, draw=flags.seed
            )
            outcomes = asyncio.run(work)
        finally:
            valkey.close()
    for outcome in outcomes:
        print(f"{outcome.statuses.total()} answers: {dict(sorted(outcome.statuses.items()))}")
        print("\n".join(outcome.failures[:20]))
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
