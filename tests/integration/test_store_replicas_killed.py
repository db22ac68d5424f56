"""Stores of one Valkey are killed in turn under load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.replica_campaign import run_replica_campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
def test_no_request_fails_while_one_of_two_stores_is_killed_again_and_again(tmp_path: Path) -> None:
    tally = run_replica_campaign(tmp_path, seconds=5.0, every_s=1.5, seed=2)

    assert not tally.wrong
    assert tally.num_kills >= 2
    assert tally.num_streams > 20
    assert tally.num_fetches > 5, "nothing needed a store"
    assert tally.num_imports >= 2
    assert tally.attach_s, "the engine was never attached to the store that was killed"
    assert min(tally.attach_s) < 2.0, "at its best: a busy machine may hold up any of them"
