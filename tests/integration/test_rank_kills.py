"""Ranks of a tensor-parallel engine are killed at drawn moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.rank_kills import run_rank_kills

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
def test_a_rank_killed_during_decode_leaves_no_process_and_the_next_engine_goes_on(tmp_path: Path) -> None:
    tally = run_rank_kills(tmp_path, {2: ("decode",)}, seed=5)

    assert not tally.wrong
    assert tally.num_kills == {"decode": 1}
    assert tally.num_streams == {"whole": 3}
