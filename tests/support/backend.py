"""The compute backend of the engines in whole-stack tests: `LORAPLEX_TEST_BACKEND`, ``cpu`` (default) or ``cuda``.

Both compute in fp32, so one set of expectations serves both. Our kernels want heads of 64 and pages of a whole tile, so
on ``cuda`` every width of the tiny model, and with it every adapter, page, pool and arena, is `SCALE` times as large:
tests that count pages count the same ones.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Final

import pytest
from support.base_models import TinyBase

BACKEND: Final = os.environ.get("LORAPLEX_TEST_BACKEND", "cpu")
_FLAGS: Final = {
    "cpu": ("--device", "cpu"),
    "cuda": ("--device", "cuda", "--backend", "cuda", "--dtype", "float32"),
}
if BACKEND not in _FLAGS:
    raise pytest.UsageError(f"LORAPLEX_TEST_BACKEND={BACKEND!r} is not one of {', '.join(_FLAGS)}")
ENGINE_FLAGS: Final = _FLAGS[BACKEND]
SCALE: Final = 4 if BACKEND == "cuda" else 1


def served_base(base: TinyBase | None = None) -> TinyBase:
    """Return a tiny base model that the backend can serve: on ``cuda`` with `SCALE` times its widths."""
    base = base or TinyBase()
    return replace(
        base,
        hidden_size=SCALE * base.hidden_size,
        intermediate_size=SCALE * base.intermediate_size,
        head_dim=SCALE * base.head_dim,
    )


def kibibytes(count: int) -> str:
    """Return a size for a tiny model's pool or arena, as a command line takes it."""
    return f"{SCALE * count}KiB"
