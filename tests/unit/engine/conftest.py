"""Fixtures of the engine's unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"])
def depth(request: pytest.FixtureRequest) -> int:
    """How many steps are in flight at once."""
    return int(request.param)
