"""The supervisor, with services that do nothing but live and die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_client.serve import ServeConfig, ServeError, Stack, ValkeyAccess
from loraplex_client.serve import stack as stack_module
from loraplex_client.serve.child import ChildError, ServiceChild, ServiceSpec
from loraplex_client.serve.config import Wiring
from loraplex_client.serve.identity import ServeIdentity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

TESTS = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0


def toy(*arguments: str, name: str = "toy") -> ServiceSpec:
    return ServiceSpec(
        name=name,
        module="support.toy_service",
        arguments=arguments,
        ports={"grpc": ("--port", 0)},
        environment={"PYTHONPATH": str(TESTS)},
    )


class ToyConfig(ServeConfig):
    """A stack of toys; ``engine_args`` go to the engine."""

    def store(self, wiring: Wiring) -> ServiceSpec:
        return toy(name="adapter_store")

    def engine(self, wiring: Wiring, store_target: str, number: int = 0) -> ServiceSpec:
        return replace(toy(*self.engine_args), name=super().engine(wiring, store_target, number).name)

    def gateway(self, wiring: Wiring, store_target: str) -> ServiceSpec:
        return toy(name="gateway")


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """Return the live processes below this test: those whose environment or command line names its folder."""

    def find() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                    if str(tmp_path).encode() in text and (entry / "stat").read_text().split(") ")[1][0] != "Z":
                        found.append(int(entry.name))
        return found

    os.environ["LORAPLEX_TEST_FOLDER"] = str(tmp_path)
    yield find
    del os.environ["LORAPLEX_TEST_FOLDER"]


async def until(claim: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until a claim holds, or fail after `DEADLINE_S`."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        result = claim()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < deadline, "still not so"
        await asyncio.sleep(0.02)


def accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_secrets_reach_every_service_and_no_command_line(tmp_path: Path) -> None:
    config = ServeConfig(model=tmp_path, data_dir=tmp_path, metrics_key="hush-hush", base_args=("--enable-reflection",))
    valkey = ValkeyAccess(url="rediss://:hush-hush@v:6379", tls_ca=tmp_path / "ca")
    wiring = Wiring(valkey=valkey, identity=ServeIdentity(tmp_path))

    specs = [config.store(wiring), config.engine(wiring, "s:1"), config.gateway(wiring, "s:1")]

    given = {name: value for spec in specs for name, value in spec.environment.items() if name != "HF_HUB_OFFLINE"}
    services = ("ADAPTER_STORE", "ENGINE", "GATEWAY")
    values = {"METRICS_KEY": "hush-hush", "REDIS_URL": valkey.url, "REDIS_TLS_CA": str(tmp_path / "ca")}
    assert given == {f"LORAPLEX_{service}_{name}": text for service in services for name, text in values.items()}
    assert all("--enable-reflection" in spec.arguments for spec in specs)
    assert not any("hush-hush" in word for spec in specs for word in spec.arguments)


async def test_a_child_is_ready_when_it_says_so(tmp_path: Path) -> None:
    child = ServiceChild(toy(), tmp_path)

    await child.start()

    assert accepts(child.addresses["grpc"])
    await child.stop(DEADLINE_S)
    assert not accepts(child.addresses["grpc"])


async def test_a_child_that_ends_while_starting_is_reported_with_its_last_words(tmp_path: Path) -> None:
    child = ServiceChild(toy("--fail"), tmp_path)

    with pytest.raises(ChildError, match=r"toy ended with exit code 3 while starting(.|\n)*cannot go on"):
        await child.start()


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    child = ServiceChild(toy("--stubborn"), tmp_path)
    await child.start()

    await child.stop(0.1)

    assert await child.wait() == "signal SIGKILL"


@pytest.mark.parametrize("victim", ["adapter_store", "engine", "gateway"])
async def test_a_part_that_is_killed_runs_again_on_the_same_port(
    tmp_path: Path, pids: Callable[[], list[int]], victim: str
) -> None:
    reports: list[str] = []
    stack = Stack(
        ToyConfig(model=tmp_path, data_dir=tmp_path / "data", valkey=ValkeyAccess(url="redis://unused")), reports.append
    )
    await stack.start()
    address = {"adapter_store": stack.store, "engine": stack.engines[0], "gateway": stack.grpc}[victim]
    running = asyncio.create_task(stack.run())

    child = next(child for child in stack._children if child.name == victim)
    child.kill()
    await until(lambda: any(line == f"{victim} runs again" for line in reports))

    assert accepts(address)
    assert any(f"{victim} died (signal SIGKILL)" in line for line in reports)
    running.cancel()
    await stack.stop()
    assert pids() == []


async def test_a_part_that_fails_to_start_ends_the_rest(tmp_path: Path, pids: Callable[[], list[int]]) -> None:
    config = ToyConfig(
        model=tmp_path, data_dir=tmp_path / "data", valkey=ValkeyAccess(url="redis://unused"), engine_args=("--fail",)
    )

    with pytest.raises(ServeError, match="engine ended with exit code 3"):
        await Stack(config, lambda line: None).start()

    assert pids() == []


async def test_a_part_that_dies_again_and_again_ends_the_rest(
    tmp_path: Path, pids: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_module, "FIRST_BACKOFF_S", 0.001)
    reports: list[str] = []
    stack = Stack(
        ToyConfig(model=tmp_path, data_dir=tmp_path / "data", valkey=ValkeyAccess(url="redis://unused")), reports.append
    )
    await stack.start()
    engine = next(child for child in stack._children if child.name == "engine")

    async def kill_often() -> None:
        for number in range(stack_module.MAX_NUM_RESTARTS + 1):
            engine.kill()
            if number < stack_module.MAX_NUM_RESTARTS:
                await until(lambda number=number: reports.count("engine runs again") > number)  # type: ignore[misc]

    killing = asyncio.create_task(kill_often())
    with pytest.raises(ServeError, match="engine died 6 times"):
        await stack.run()

    await killing
    await stack.stop()
    assert pids() == []


@pytest.mark.integration
async def test_nobody_else_may_enter_the_folders_of_adapters_and_logs(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    (data_dir / "valkey").mkdir(parents=True)  # as an earlier release left it
    stack = Stack(ToyConfig(model=tmp_path, data_dir=data_dir), lambda _: None)

    await stack.start()
    await stack.stop()

    assert {path.name: path.stat().st_mode & 0o777 for path in data_dir.iterdir()} == {
        "credentials": 0o700,
        "logs": 0o700,
        "valkey": 0o700,
    }


@pytest.mark.integration
async def test_the_embedded_valkey_survives_a_kill_with_its_data(tmp_path: Path, pids: Callable[[], list[int]]) -> None:
    from loraplex_common.secret import Secret
    from loraplex_common.valkey import connect

    reports: list[str] = []
    stack = Stack(ToyConfig(model=tmp_path, data_dir=tmp_path / "data"), reports.append)
    await stack.start()
    running = asyncio.create_task(stack.run())
    valkey = stack._children[0]
    access = valkey.access  # type: ignore[union-attr]
    assert access.password_file is not None
    client = connect(access.url, password=Secret(access.password_file.read_text().strip()))
    await client.set("kept", "yes")
    await client.waitaof(1, 0, 5000)

    valkey.kill()
    await until(lambda: "valkey runs again" in reports)

    assert await client.get("kept") == b"yes"
    await client.aclose()
    running.cancel()
    await stack.stop()
    assert pids() == []


async def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path, pids: Callable[[], list[int]]) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from loraplex_client.serve.child import ServiceChild, ServiceSpec\n"
        "async def main():\n"
        "    spec = ServiceSpec(name='toy', module='support.toy_service', arguments=(), ports={'grpc': ('--port', 0)})\n"
        f"    child = ServiceChild(spec, Path({str(tmp_path)!r}))\n"
        "    await child.start()\n"
        "    print(child.addresses['grpc'], flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    supervisor = subprocess.Popen(  # noqa: ASYNC220 -- the loop has nothing else to do
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TESTS)}
    )
    assert supervisor.stdout is not None
    address = supervisor.stdout.readline().decode().strip()
    assert accepts(address)

    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()

    await until(lambda: not accepts(address))
    await until(lambda: pids() == [])
