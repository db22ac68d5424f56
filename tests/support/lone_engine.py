"""An engine process on its own, as pytest fixtures: the process, a gateway's session with it, and a stub."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2
from loraplex_common.grpc_channel import open_channel
from support.base_models import TinyBase, write_base_model
from support.engine_sessions import EngineSessionClient
from support.processes import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

PROMPT = [5, 6, 7, 8, 9]
DIGEST = "ab" * 32
LENGTH = gateway_pb2.FINISH_REASON_LENGTH


@contextmanager
def starting_engine(
    directory: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """Start an engine, ready or not, that ends with the block: in order if the block has not ended it, at once if the block failed."""
    model = directory / "tiny"
    if not model.exists():
        write_base_model(model, TinyBase())
    sizes = ("--pool-bytes", "2MiB", "--arena-bytes", "2MiB", "--num-threads", "1", "--drain-settle-s", "0")
    arguments = ["--model", str(model), "--port", "0", "--metrics-port", "0", *sizes, *flags]
    process = ServiceProcess("loraplex_engine", arguments, log_dir=directory, environment=environment)
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    assert not process.is_running or process.stop() == 0, process.log()


@contextmanager
def running_engine(directory: Path, *flags: str) -> Iterator[ServiceProcess]:
    """Start an engine as `starting_engine` does, and wait until it is ready."""
    with starting_engine(directory, *flags) as process:
        yield process.wait_ready()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """An engine of a tiny base model, without a store."""
    with running_engine(tmp_path_factory.mktemp("engine"), "--session-grace-s", "0.2") as process:
        yield process


@pytest.fixture
async def session(engine: ServiceProcess) -> AsyncIterator[EngineSessionClient]:
    """A session with the engine."""
    async with EngineSessionClient(engine.grpc) as client:
        yield client


@pytest.fixture
async def stub(engine: ServiceProcess) -> AsyncIterator[engine_pb2_grpc.EngineServiceAsyncStub]:
    """A stub for the engine's other calls."""
    async with open_channel(engine.grpc) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


async def is_idle(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> bool:
    """True if the engine holds no request and every page is free."""
    async for response in stub.WatchLoad(engine_pb2.WatchLoadRequest()):
        load = response.load
        return load.running == load.waiting == 0 and load.pages_free == load.pages_total
    return False
