"""Engine, gateway and adapter store take their base model by its name on a hub, each for itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from loraplex_client import AsyncClient
from loraplex_common.errors import NoEngineError
from support.base_models import TinyBase, write_base_model
from support.hub_double import HubDouble, running_hub
from support.processes import ServiceProcess
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PORTS = ("--port", "0", "--metrics-port", "0")
ENGINE = ("--pool-bytes", "2MiB", "--arena-bytes", "2MiB", "--num-threads", "1", "--drain-settle-s", "0")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubDouble]:
    base = write_base_model(tmp_path / "written", TinyBase())
    files = {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}
    with running_hub(HubDouble("org/base", COMMIT, files)) as running:
        yield running


def start(module: str, hub: HubDouble, home: Path, *arguments: str) -> ServiceProcess:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return ServiceProcess(module, [*PORTS, *arguments], log_dir=home, environment=settings)


async def test_each_service_fetches_what_is_not_here_and_serves_it_under_its_name(
    hub: HubDouble, tmp_path: Path, valkey_url: str
) -> None:
    registry = ("--redis-url", valkey_url)
    with ExitStack() as stack:
        engine = start("loraplex_engine", hub, tmp_path, "--model", f"org/base@{COMMIT}", *registry, *ENGINE)
        stack.callback(engine.kill)
        flags = ("--http-port", "0", "--workers", "2", "--drain-settle-s", "0")
        gateway = start("loraplex_gateway", hub, tmp_path, "--model", "org/base", *registry, *flags)
        stack.callback(gateway.kill)
        store = start("loraplex_adapter_store", hub, tmp_path, "--model", "org/base", *registry)
        stack.callback(store.kill)
        for service in (engine, gateway, store):
            service.wait_ready()
        assert any(path.endswith("model.safetensors") for path in hub.requests)
        async with AsyncClient(gateway.grpc) as client:

            async def answers() -> bool:
                try:
                    done = await client.generate_once(
                        prompt_token_ids=[5, 6, 7], model="org/base", max_new_tokens=4, temperature=0, ignore_eos=True
                    )
                except NoEngineError:
                    return False
                return len(done.token_ids) == 4

            await eventually(answers, what="the engine is found")
        assert f"remedy='--model org/base@{COMMIT}'" in gateway.log()
        assert "not pinned" not in engine.log()
        assert [service.stop() for service in (engine, gateway, store)] == [0, 0, 0]


@pytest.mark.parametrize("module", ["loraplex_engine", "loraplex_gateway", "loraplex_adapter_store"])
def test_a_service_says_in_one_line_what_is_not_on_the_hub(
    hub: HubDouble, tmp_path: Path, valkey_url: str, module: str
) -> None:
    more = ("--http-port", "0") if module == "loraplex_gateway" else ()

    service = start(module, hub, tmp_path, "--model", "org/other", "--redis-url", valkey_url, *more)

    assert service.wait() != 0
    assert f"org/other: no such repository at {hub.url}" in service.log()
    assert "Traceback" not in service.log()
