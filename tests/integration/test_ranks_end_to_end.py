"""A whole stack whose engine is several processes computes what PEFT computes, while adapters come, go and change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.rank_campaign import SERVED_METHODS, GroupFlags, run_rank_campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
@pytest.mark.parametrize("group", [GroupFlags(2, "divided"), GroupFlags(4, "divided"), GroupFlags(4)])
def test_adapters_of_every_method_evicted_replaced_and_pushed_equal_peft(tmp_path: Path, group: GroupFlags) -> None:
    tally = run_rank_campaign(tmp_path, group=group, num_rounds=1, num_requests=40, seed=20)

    assert tally.is_good, tally
    assert set(tally.by_method) == {"base", *SERVED_METHODS}
    assert tally.num_positions > 100
    assert set(tally.num_changes) == {"evict", "replace", "push"}
