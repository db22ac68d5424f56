"""Outputs of a real engine keep to random JSON Schemas, through any adapter, at any temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.structured_campaign import run_structured_campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
async def test_whatever_stops_is_valid_and_whatever_is_cut_begins_a_valid_output(tmp_path: Path) -> None:
    tally = await run_structured_campaign(tmp_path, num_requests=40, seed=11)
    assert tally.wrong == []
    assert tally.num_requests == 40
    assert tally.num_stopped >= 32, tally
