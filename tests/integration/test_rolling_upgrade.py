"""A stack of the previous version is replaced part by part under streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.upgrade_campaign import PREVIOUS, has_history, run_upgrade

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(600)  # ten processes start one after another
@pytest.mark.integration
@pytest.mark.skipif(not has_history(), reason=f"a shallow clone: the history does not have {PREVIOUS[:12]}")
def test_no_stream_is_lost_or_altered_while_every_part_of_the_previous_version_is_replaced(tmp_path: Path) -> None:
    tally = run_upgrade(tmp_path, num_at_once=4)

    assert not tally.wrong
    assert set(tally.streams_during) == {"start", "store", "engine 0", "engine 1", "gateway 0", "gateway 1"}
    assert tally.skewed == {"new/old": 6, "old/new": 6}
