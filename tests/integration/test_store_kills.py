"""Store and Valkey are killed at drawn steps of what changes and delivers adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.store_kills import run_kill_campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
def test_a_kill_at_any_step_loses_nothing_acknowledged_and_leaves_nothing_half_there(tmp_path: Path) -> None:
    tally = run_kill_campaign(tmp_path, kills=8, seed=3)

    assert not tally.wrong
    assert sum(tally.num_kills.values()) == 8
    assert tally.num_images > 8
