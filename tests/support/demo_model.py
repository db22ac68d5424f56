"""The demo's real base model, converted once per machine."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from loraplex_client.demo.fetch import cache_dir, ensure_demo_model

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_ADAPTERS = {
    name: REPOSITORY / "examples/demo/adapters" / name for name in ("json", "devil", "kjv", "upper", "sentiment")
}
GOLDEN = REPOSITORY / "examples/demo/golden.json"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face layout, from the cache or fetched and converted into it.

    Workers of a parallel run take turns behind a file lock: one converts, the others find it done.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return ensure_demo_model(lambda *_: None)
