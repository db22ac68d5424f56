"""A real engine with adapters of every method in a pool that holds few of them computes what PEFT computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.adapter_campaign import run_adapter_campaign
from support.campaign_adapters import METHODS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
def test_random_mixtures_of_all_methods_evicted_and_reloaded_equal_peft(tmp_path: Path) -> None:
    tally = run_adapter_campaign(tmp_path, num_rounds=2, num_requests=22, seed=16)

    assert tally.is_good, tally
    assert set(tally.by_method) == {"base", *METHODS}
    assert tally.num_positions > 150
    assert tally.num_reloads > len(METHODS), "the pool is too large: adapters have to leave it and come back"
