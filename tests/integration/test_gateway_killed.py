"""A gateway that is killed, or goes away in a hurry, loses no stream of a client that knows another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.gateway_kills import run_campaign

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

NUM_ROUNDS = int(os.environ.get("LORAPLEX_TEST_GATEWAY_KILLS", "3"))


@pytest.mark.parametrize("gently", [False, True], ids=["killed", "drained"])
async def test_streams_of_every_kind_end_as_if_no_gateway_had_gone(tmp_path: Path, gently: bool) -> None:
    tally = await run_campaign(tmp_path, num_rounds=NUM_ROUNDS, seed=11, gently=gently)

    assert not tally.wrong, "\n".join(tally.wrong[:5])
    assert tally.num_kills == NUM_ROUNDS
    assert tally.num_resumes >= NUM_ROUNDS
    assert tally.num_streams > 20
