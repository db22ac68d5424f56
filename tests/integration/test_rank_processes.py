"""An engine of several processes computes what one computes, and ends as a whole when any of them ends."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import EngineHungError
from loraplex_common.rpc_errors import error_from_rpc
from support.engine_sessions import EngineSessionClient
from support.lone_engine import PROMPT, running_engine, starting_engine
from support.rank_processes import followers_of, is_alive

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

EXIT_HUNG = 70
GONE_S = 2.0
STARTED_S = 60.0


async def generate(target: str) -> list[list[int]]:
    """Return what greedy requests draw that run at once."""
    async with EngineSessionClient(target) as session:
        prompts = [PROMPT, [7], list(range(10, 60))]
        outcomes = [await session.submit(slot, prompt, 24) for slot, prompt in enumerate(prompts)]
        return [await session.finish(outcome) for outcome in outcomes]


@pytest.mark.parametrize("degree", [2, 4])
async def test_several_processes_draw_what_one_draws_and_end_with_the_engine(tmp_path: Path, degree: int) -> None:
    with running_engine(tmp_path) as engine:
        alone = await generate(engine.grpc)
    with running_engine(tmp_path, "--tensor-parallel", str(degree)) as engine:
        together = await generate(engine.grpc)
        followers = followers_of(engine.pid)

    assert together == alone
    assert len(followers) == degree - 1
    assert not any(is_alive(pid) for pid in followers)


@pytest.mark.parametrize("victim", ["another rank", "rank 0"])
@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "decoding"])
async def test_a_killed_rank_ends_the_engine_and_all_its_processes(tmp_path: Path, victim: str, is_idle: bool) -> None:
    with running_engine(tmp_path, "--tensor-parallel", "2") as engine:
        (follower,) = followers_of(engine.pid)
        async with EngineSessionClient(engine.grpc) as session:
            outcome = await session.submit(0, PROMPT, 1 if is_idle else 500)
            await asyncio.wait_for(outcome.has_tokens.wait(), 20)
            if is_idle:
                await session.finish(outcome)

            began_s = time.monotonic()
            os.kill(follower if victim == "another rank" else engine.pid, signal.SIGKILL)
            status = await asyncio.to_thread(engine.wait)
            while is_alive(follower):
                assert time.monotonic() - began_s < GONE_S, "rank 1 outlives its engine"
                await asyncio.sleep(0.01)
            took_s = time.monotonic() - began_s

            assert took_s < GONE_S, engine.log()
            if victim == "another rank":
                assert status == EXIT_HUNG, engine.log()
                await asyncio.wait_for(session.is_over.wait(), 5)
                assert session.failure is not None
                assert isinstance(error_from_rpc(session.failure), EngineHungError)
                assert outcome.num_ends == int(is_idle), "the request is not to blame"


def test_an_engine_killed_while_its_ranks_start_leaves_no_file(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with starting_engine(tmp_path, "--tensor-parallel", "2", environment={"TMPDIR": str(temporary)}) as engine:
        until_s = time.monotonic() + STARTED_S
        while not followers_of(engine.pid):
            assert time.monotonic() < until_s, f"rank 1 is not started\n{engine.log()}"
            time.sleep(0.001)
        engine.kill()

    assert not list(temporary.iterdir())


def test_a_model_that_cannot_be_divided_is_refused_with_the_flag(tmp_path: Path) -> None:
    refusal = pytest.raises(AssertionError, match="--tensor-parallel 3: num_heads 4 cannot be split over tp_degree 3")
    with refusal, running_engine(tmp_path, "--tensor-parallel", "3"):
        pass
