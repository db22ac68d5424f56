"""Random faults against a whole fleet for three minutes: no token is wrong, nothing hangs, refusals have a reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.soak.run import Plan, soak

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

MINUTES = 3.0
SEED = 13
NUM_KINDS = 19


async def test_a_fleet_under_random_faults_answers_truthfully_and_recovers(tmp_path: Path) -> None:
    report = await soak(tmp_path, Plan(MINUTES, SEED))

    told = json.dumps(report.as_json(), indent=1)
    assert report.is_good, told
    assert report.outcomes["ok"] > 50, told
    assert len(report.faults) >= NUM_KINDS - 2, told
