"""``loraplex serve`` and the commands against it, as processes, on a tiny model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import httpx
import pytest
from loraplex_client import Client, Finished, Started
from loraplex_client._servers import Servers
from loraplex_common.errors import LoraplexError
from support import reflected
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.serve_process import SMALL, ServeProcess, is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "tiny", TinyBase())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one", base, Recipe(rank=8))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[ServeProcess]:
    key = tmp_path_factory.mktemp("metrics") / "key"
    key.write_text("k\n")
    flags = ("--model", str(base), "--enable-reflection", "--metrics-key-file", str(key), *SMALL)
    process = ServeProcess(tmp_path_factory.mktemp("serve") / "data", *flags, "--ui")
    yield process
    process.close()


def store_answers(client: Client) -> bool:
    try:
        next(client.adapters.list(), None)
    except LoraplexError:
        return False
    return True


@pytest.fixture
def client(stack: ServeProcess) -> Iterator[Client]:
    with Client(stack.grpc, store_target=stack.store) as client:
        yield client


def loraplex(stack: ServeProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LORAPLEX_TARGET": stack.grpc,
        "LORAPLEX_STORE_TARGET": stack.store,
        "COLUMNS": "160",
    }
    command = [sys.executable, "-m", "loraplex_client", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def answers(client: Client, adapter: str | None = None) -> bool:
    try:
        client.generate_once(prompt="Hello", adapter=adapter, max_new_tokens=1, timeout=10)
    except LoraplexError:
        return False
    return True


def knows(client: Client, name: str) -> bool:
    return name in {model.name for model in client.list_models()}


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_every_service_can_be_called_from_what_reflection_says_of_it(stack: ServeProcess, version: str) -> None:
    servers = Servers(stack.grpc)
    connections = {
        stack.grpc: servers.gateways[0],
        stack.store: servers.store,
        stack.engine: servers.engine(stack.engine),
    }
    for target, *services in (
        (stack.grpc, "loraplex.v1.GatewayService"),
        (stack.engine, "loraplex.v1.EngineService"),
        (stack.store, "loraplex.v1.AdapterStoreService", "google.longrunning.Operations"),
    ):
        async with connections[target].open_aio() as channel:
            assert set(services) <= await reflected.list_services(channel, version)
            for service in services:
                files = await reflected.files_of(channel, version, service)
                assert service in {f"{file.package}.{known.name}" for file in files for known in file.service}


def test_serve_hands_its_metrics_key_to_the_gateway(stack: ServeProcess) -> None:
    def status(authorization: str) -> int:
        return httpx.get(f"http://{stack.metrics}/metrics", headers={"Authorization": authorization}).status_code

    assert [status("Bearer k"), status("Bearer guess")] == [200, 401]


def test_an_adapter_is_imported_used_listed_and_deleted(stack: ServeProcess, client: Client, adapter: Path) -> None:
    imported = loraplex(stack, "adapters", "import", "first", str(adapter))
    wait_until(lambda: knows(client, "first"))
    with_adapter = loraplex(
        stack, "generate", "--adapter", "first", "--temperature", "0", "--max-new-tokens", "8", "Hi"
    )
    without = loraplex(stack, "generate", "--temperature", "0", "--max-new-tokens", "8", "Hi")
    listed = loraplex(stack, "adapters", "list")
    status = loraplex(stack, "status", "--engine-target", stack.engine)
    deleted = loraplex(stack, "adapters", "delete", "first", "--force")
    wait_until(lambda: not knows(client, "first"))
    refused = loraplex(stack, "generate", "--adapter", "first", "--max-new-tokens", "1", "Hi")

    assert [r.returncode for r in (imported, with_adapter, without, listed, status, deleted)] == [0] * 6, (
        imported.stderr
    )
    assert with_adapter.stdout != without.stdout
    assert "first" in listed.stdout
    assert "torch fp32" in status.stdout
    assert "device on 1" in status.stdout
    assert refused.returncode == 1
    assert "ADAPTER_NOT_FOUND" in refused.stderr


def test_the_digits_that_status_prints_are_taken_by_every_command(
    stack: ServeProcess, client: Client, base: Path, tmp_path: Path
) -> None:
    latest, canary = (
        client.adapters.upload(
            "two", write_adapter(tmp_path / f"{seed}", base, Recipe(rank=2, seed=seed)), label=label, stage=bool(label)
        ).revision.digest
        for seed, label in ((5, ""), (6, "canary"))
    )
    wait_until(lambda: knows(client, "two"))

    status = loraplex(stack, "status")  # the gateway's word alone

    rows = [line.split() for line in status.stdout.splitlines()]
    assert (status.returncode, status.stderr) == (0, "")
    assert [stack.engine, "tiny"] == rows[1][1:3]
    assert [row[2:4] for row in rows if row[:1] == ["two"]] == [[latest[:12], "latest"], [canary[:12], "canary"]]
    named = f"two@{canary[:12]}"
    for command in (
        ("generate", "--adapter", named, "--max-new-tokens", "1", "Hi"),
        ("adapters", "show", named),
        ("adapters", "prefetch", named),
        ("adapters", "evict", named),
        ("adapters", "alias", "two", "prod", canary[:12]),
        ("adapters", "alias", "two", "prod", latest[:12], "--expect", canary[:12]),
    ):
        done = loraplex(stack, *command)
        assert done.returncode == 0, (command, done.stderr)
    assert client.adapters.get("two").aliases == {"latest": latest, "canary": canary, "prod": latest}


def test_the_http_port_says_its_version(stack: ServeProcess) -> None:
    with urllib.request.urlopen(f"http://{stack.http}/version", timeout=10) as page:
        assert json.loads(page.read()) == {"version": importlib.metadata.version("loraplex")}


def test_the_page_is_shown_and_told_of_the_engine(stack: ServeProcess) -> None:
    with httpx.stream("GET", f"http://{stack.http}/ui/events", timeout=30) as response:
        told = next(line for line in response.iter_lines() if '"snapshot":true' in line)

    assert stack.engine in told
    assert "<title>loraplex</title>" in httpx.get(f"http://{stack.http}/ui", timeout=10).text


def test_the_store_can_be_killed_while_a_stream_runs(stack: ServeProcess, client: Client, adapter: Path) -> None:
    client.adapters.upload("kept", adapter)
    wait_until(lambda: knows(client, "kept"))
    stream = client.generate(prompt="Hello", adapter="kept", max_new_tokens=100, ignore_eos=True, temperature=0)
    assert isinstance(next(stream), Started)

    os.kill(stack.children()["adapter_store"], signal.SIGKILL)

    end = list(stream)[-1]
    assert isinstance(end, Finished)
    assert end.usage.output_tokens == 100
    wait_until(lambda: "adapter_store runs again" in stack.errors)
    wait_until(lambda: store_answers(client))
    assert client.adapters.get("kept").resolved is not None
    client.adapters.upload("after", adapter, label="second")
    wait_until(lambda: answers(client, "after"))


def test_valkey_can_be_killed_without_losing_what_was_imported(
    stack: ServeProcess, client: Client, base: Path, tmp_path: Path
) -> None:
    fresh = write_adapter(tmp_path / "fresh", base, Recipe(rank=4, seed=1))
    digest = client.adapters.upload("durable", fresh).revision.digest
    wait_until(lambda: knows(client, "durable"))
    stream = client.generate(prompt="Hello", max_new_tokens=100, ignore_eos=True, temperature=0)
    assert isinstance(next(stream), Started)

    os.kill(stack.children()["valkey"], signal.SIGKILL)

    assert isinstance(list(stream)[-1], Finished)
    wait_until(lambda: "valkey runs again" in stack.errors)
    wait_until(lambda: answers(client, "durable"))
    resolved = client.adapters.get("durable").resolved
    assert resolved is not None
    assert resolved.digest == digest


def test_the_engine_can_be_killed_and_serves_again(stack: ServeProcess, client: Client) -> None:
    os.kill(stack.children()["engine"], signal.SIGKILL)

    wait_until(lambda: "engine runs again" in stack.errors, 60)
    wait_until(lambda: answers(client), 60)


def test_sigterm_ends_everything(stack: ServeProcess) -> None:
    """Last of those that use the shared stack."""
    children = stack.children()
    assert children.keys() == {"valkey", "adapter_store", "engine", "gateway"}

    assert stack.terminate() == 0

    assert not any(is_alive(pid) for pid in children.values())


def test_nothing_outlives_a_serve_that_is_killed(base: Path, tmp_path: Path) -> None:
    process = ServeProcess(tmp_path / "data", "--model", str(base), *SMALL)
    children = process.children()

    process.kill()

    wait_until(lambda: not any(is_alive(pid) for pid in children.values()))
    process.close()


def test_a_model_that_is_none_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(AssertionError, match=r"serve ended with 1(.|\n)*config\.json"):
        ServeProcess(tmp_path / "data", "--model", str(tmp_path / "empty"), *SMALL)
