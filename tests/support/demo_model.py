"""The demo's real base model, converted once per machine, or the one that `LORAPLEX_DEMO_MODEL_DIR` names."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from loraplex_client.demo import FetchError
from loraplex_client.demo.fetch import cache_dir, ensure_demo_model

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_ADAPTERS = {
    name: REPOSITORY / "examples/demo/adapters" / name for name in ("json", "devil", "kjv", "upper", "sentiment")
}
GOLDEN = REPOSITORY / "examples/demo/golden.json"


def find_demo_model() -> Path:
    """Return SmolLM2-135M-Instruct in Hugging Face layout, from the cache or fetched and converted into it.

    Workers of a parallel run take turns behind a file lock: one converts, the others find it done.

    Raises:
        FetchError: If it is not cached and cannot be fetched.
    """
    if directory := os.environ.get("LORAPLEX_DEMO_MODEL_DIR"):
        return Path(directory)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return ensure_demo_model(lambda *_: None)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct."""
    return find_demo_model()


@pytest.fixture(scope="session")
def smollm2_dir_if_there() -> Path:
    """SmolLM2-135M-Instruct; skips on machines that neither have it nor can fetch it, which GPU machines may be."""
    try:
        return find_demo_model()
    except FetchError as error:
        pytest.skip(f"the demo's base model is not here (LORAPLEX_DEMO_MODEL_DIR names it): {error}")
