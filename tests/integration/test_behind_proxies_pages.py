"""Requests that end early behind a proxy give their pages back within a step of a real engine, whose pool and steps are watched."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import DeadlineError
from loraplex_common.grpc_channel import open_channel
from loraplex_engine.config import EngineConfig
from loraplex_engine.pages.page_pool import PagePool
from loraplex_engine.scheduler.scheduler import Scheduler
from loraplex_engine.service import EngineService
from support.base_models import TinyBase, write_base_model
from support.gateway_rig import text_request
from support.proxied_gateways import backends, failure_of, one_more_gateway
from support.proxies import KINDS, Proxy, running_proxy
from support.tcp_relay import TcpRelay
from support.valkey import fresh_database
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey
    from loraplex_engine.pages.page_pool import Pages
    from loraplex_engine.step import StepPlan

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
DEADLINE_S = 1.0
# More than even a fast machine computes in the time of a test.
NUM_POSITIONS = 4096
LONG = gateway_pb2.StoppingParams(max_new_tokens=NUM_POSITIONS - 100, ignore_eos=True)


@dataclass(slots=True)
class Watched:
    """A real engine in this process; steps are counted as they are launched.

    Attributes:
        aborted_at: The step at which each request was aborted.
        released_at: The step at which pages were given back.
        turns: Monotonic time and step of each look for work.
    """

    service: EngineService
    aborted_at: list[int] = field(default_factory=list)
    released_at: list[int] = field(default_factory=list)
    turns: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Steps launched so far."""
        return self.service.engine.totals.num_steps

    @property
    def num_kv_pages(self) -> int:
        """Pages that requests hold."""
        return self.service.engine.snapshot().pages_kv

    def step_at(self, moment: float) -> int:
        """Return the last step launched before a moment of `time.monotonic`."""
        return max(step for at, step in self.turns if at <= moment)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note from now on what happens on the step loop's thread."""
        for notes in (self.aborted_at, self.released_at, self.turns):
            notes.clear()
        abort, release, schedule = Scheduler.abort, PagePool.release, Scheduler.schedule

        def noting_abort(scheduler: Scheduler, session_id: int, session_slot: int) -> None:
            self.aborted_at.append(self.num_steps)
            abort(scheduler, session_id, session_slot)

        def noting_release(pool: PagePool, pages: Pages, last_step: int) -> float:
            self.released_at.append(self.num_steps)
            return release(pool, pages, last_step)

        def noting_schedule(scheduler: Scheduler) -> StepPlan | None:
            self.turns.append((time.monotonic(), self.num_steps))
            return schedule(scheduler)

        monkeypatch.setattr(Scheduler, "abort", noting_abort)
        monkeypatch.setattr(PagePool, "release", noting_release)
        monkeypatch.setattr(Scheduler, "schedule", noting_schedule)


@asynccontextmanager
async def running_engine(model: Path, valkey_url: str) -> AsyncIterator[Watched]:
    """Run an engine on a CPU that registers itself."""
    config = EngineConfig(
        model=model, port=0, metrics_port=0, redis_url=valkey_url, num_threads=1, pool_bytes=4 * 2**20
    )
    service = EngineService(config)
    try:
        await service.start()
        yield Watched(service)
    finally:
        await service.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def shared(
    request: pytest.FixtureRequest, valkey_server: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Watched, Proxy]]:
    """The engine, and a proxy of each kind before two gateways."""
    url, directory = fresh_database(valkey_server), tmp_path_factory.mktemp(request.param)
    model = write_base_model(directory / "tiny", TinyBase(max_position_embeddings=NUM_POSITIONS))
    async with (
        running_engine(model, url) as engine,
        one_more_gateway(url, model=(model,)) as first,
        one_more_gateway(url, model=(model,)) as second,
        running_proxy(request.param, directory, backends([first, second])) as proxy,
    ):
        yield engine, proxy


@asynccontextmanager
async def beside_another(
    engine: Watched, target: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
    """Let a stream run beside the block, so that steps go on, and check that no page is lost."""
    async with open_channel(target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        beside = stub.Generate(text_request("a neighbour", stopping=LONG), timeout=60)
        await beside.read()
        engine.watch(monkeypatch)
        yield stub
        assert not beside.done(), "it ran all the while"
        beside.cancel()
    await eventually(lambda: engine.num_kv_pages == 0)
    await asyncio.wrap_future(engine.service.engine.check_integrity())


async def begin(stub: gateway_pb2_grpc.GatewayServiceAsyncStub) -> Any:
    """Start a request and return its call once tokens have come."""
    call = stub.Generate(text_request(stopping=LONG), timeout=60)
    async for response in call:
        if response.chunk.token_ids:
            break
    return call


async def test_a_cancelled_request_gives_its_pages_back_within_a_step(
    shared: tuple[Watched, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, proxy = shared
    async with beside_another(engine, proxy.grpc, monkeypatch) as stub:
        call = await begin(stub)

        call.cancel()

        await eventually(lambda: engine.released_at)
        assert engine.released_at[0] <= engine.aborted_at[0] + 1


async def test_the_request_of_a_client_that_is_gone_gives_its_pages_back_within_a_step(
    shared: tuple[Watched, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, proxy = shared
    async with (
        TcpRelay(proxy.grpc) as relay,
        open_channel(relay.target) as channel,
        beside_another(engine, proxy.grpc, monkeypatch),
    ):
        await begin(gateway_pb2_grpc.GatewayServiceStub(channel))

        relay.reset()

        await eventually(lambda: engine.released_at)
        assert engine.released_at[0] <= engine.aborted_at[0] + 1


async def test_a_request_gives_its_pages_back_within_a_step_of_its_deadline(
    shared: tuple[Watched, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, proxy = shared
    async with beside_another(engine, proxy.grpc, monkeypatch) as stub:
        deadline = time.monotonic() + DEADLINE_S

        error = await failure_of(stub.Generate(text_request(stopping=LONG), timeout=DEADLINE_S))

        assert isinstance(error, DeadlineError)
        await eventually(lambda: engine.released_at)
        assert engine.released_at[0] <= engine.step_at(deadline) + 1
