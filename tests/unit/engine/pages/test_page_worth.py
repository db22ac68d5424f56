"""What a page is worth."""

from __future__ import annotations

import numpy as np
from loraplex_engine.pages.page_worth import EXPECTED_COST


def test_by_expected_cost_frequent_and_dear_adapters_are_worth_more() -> None:
    base = EXPECTED_COST.of_adapter(octaves=3.0, cost_s=1e-3, used=0.0)

    assert EXPECTED_COST.of_adapter(octaves=4.0, cost_s=1e-3, used=0.0) == base + 1
    assert EXPECTED_COST.of_adapter(octaves=3.0, cost_s=2e-3, used=9.0) == base + 1
    assert EXPECTED_COST.of_blocks(np.array([2.0]), 2.0).tolist() == [3.0]
