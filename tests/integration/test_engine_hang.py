"""An engine process whose device hangs: every caller is told, and the process ends so that it is started again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import support
from loraplex_common import valkey
from loraplex_common.errors import EngineHungError
from loraplex_common.registry import RegistryReader
from loraplex_common.rpc_errors import error_from_rpc
from support.base_models import TinyBase, write_base_model
from support.engine_sessions import EngineSessionClient
from support.lone_engine import PROMPT
from support.processes import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

PATIENCE_S = 1.0
EXIT_HUNG = 70


@pytest.fixture
def engine(tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceProcess]:
    monkeypatch.setenv("PYTHONPATH", str(Path(support.__path__[0]).parent))
    model = write_base_model(tmp_path / "tiny", TinyBase())
    sizes = ("--pool-bytes", "2MiB", "--arena-bytes", "2MiB", "--num-threads", "1")
    flags = ("--model", str(model), "--port", "0", "--metrics-port", "0", "--redis-url", valkey_url, *sizes)
    arguments = [str(tmp_path / "hang"), *flags, "--step-patience-s", str(PATIENCE_S)]
    process = ServiceProcess("support.hanging_engine", arguments, log_dir=tmp_path)
    yield process.wait_ready()
    if process.is_running:
        process.kill()


async def test_a_hung_step_ends_sessions_registration_and_process(
    engine: ServiceProcess, valkey_url: str, tmp_path: Path
) -> None:
    async with EngineSessionClient(engine.grpc) as session:
        await session.finish(await session.submit(0, PROMPT, 8))
        outcome = await session.submit(1, PROMPT, 500)
        await asyncio.wait_for(outcome.has_tokens.wait(), 20)

        (tmp_path / "hang").touch()
        began_s = time.monotonic()
        await asyncio.wait_for(session.is_over.wait(), 20)

        assert time.monotonic() - began_s < PATIENCE_S + 5.0
        assert outcome.num_ends == 0, "the request is not to blame"
        assert session.failure is not None
        assert isinstance(error_from_rpc(session.failure), EngineHungError)
    status = await asyncio.to_thread(engine.wait)
    client = valkey.connect(valkey_url)
    assert status == EXIT_HUNG, engine.log()
    assert await RegistryReader(client).read() == {}
    assert "the step loop hangs" in engine.log()
    await client.aclose()
