"""A trainer pushes a changing adapter under streams, on a whole stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.push_campaign import KEPT, run_push_campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
def test_every_stream_s_tokens_are_those_of_exactly_the_revision_that_it_reports(tmp_path: Path) -> None:
    tally = run_push_campaign(tmp_path, num_pushes=10, num_streams=6, seed=3)

    assert tally.is_good, tally
    assert tally.num_revisions >= 9
    assert tally.num_overlaps, "no stream ran while another revision came"
    assert tally.num_positions > 150
    assert tally.num_late == 0
    assert tally.num_blobs <= KEPT + 1
