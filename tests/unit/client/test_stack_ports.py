"""The ports of ``loraplex serve``: where each part goes, and that taken ones are found before anything is installed."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_client.serve import PortError, ServeConfig, assign_ports, require_free_ports
from loraplex_client.serve.ports import DEFAULT_BASE_PORT, MAX_BASE_PORT, STACK_PORTS, main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
NONE_GIVEN = dict.fromkeys((port.field for port in STACK_PORTS), None)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_the_default_ports_are_those_of_the_configuration() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(ServeConfig) if field.name.endswith("_port")}

    assert assign_ports(DEFAULT_BASE_PORT, NONE_GIVEN) == defaults


@given(base=st.integers(1, MAX_BASE_PORT), field=st.sampled_from(sorted(NONE_GIVEN)), port=st.integers(0, 65535))
def test_a_base_port_moves_every_port_alike_but_the_given_one(base: int, field: str, port: int) -> None:
    ports = assign_ports(base, {**NONE_GIVEN, field: port})

    moved = assign_ports(DEFAULT_BASE_PORT, NONE_GIVEN)
    expected = {name: number + base - DEFAULT_BASE_PORT for name, number in moved.items()}  # type: ignore[operator]
    assert ports == {**expected, field: port}


def test_base_port_0_picks_free_ones() -> None:
    assert set(assign_ports(0, NONE_GIVEN).values()) == {0}


@pytest.mark.parametrize("base", [-1, MAX_BASE_PORT + 1])
def test_a_base_port_that_leaves_no_room_is_refused(base: int) -> None:
    with pytest.raises(PortError, match="--base-port"):
        assign_ports(base, NONE_GIVEN)


@pytest.mark.parametrize("port", STACK_PORTS, ids=lambda port: port.flag)
def test_a_taken_port_is_named_with_its_part_and_flag(port: object, taken: int) -> None:
    stack_port = next(known for known in STACK_PORTS if known == port)

    with pytest.raises(PortError) as caught:
        require_free_ports("127.0.0.1", assign_ports(0, {**NONE_GIVEN, stack_port.field: taken}))

    assert f"port {taken} ({stack_port.part}, {stack_port.flag}) is taken" in str(caught.value)
    assert "--base-port" in str(caught.value)


def test_all_taken_ports_are_named_at_once_and_one_asked_for_twice(taken: int) -> None:
    ports = assign_ports(0, {**NONE_GIVEN, "grpc_port": taken, "engine_port": 9, "store_port": 9})

    with pytest.raises(PortError) as caught:
        require_free_ports("127.0.0.1", ports)

    assert f"port {taken}" in str(caught.value)
    assert "port 9 (the engine's gRPC, --engine-port) is that of the adapter store's gRPC too" in str(caught.value)


def test_the_ports_of_every_engine_are_checked(taken: int) -> None:
    ports = assign_ports(0, {**NONE_GIVEN, "engine_port": taken - 2, "engine_metrics_port": 9}, num_engines=3)

    with pytest.raises(PortError) as caught:
        require_free_ports("127.0.0.1", ports, num_engines=3)

    assert f"port {taken} (engine 1's gRPC, --engine-port) is taken" in str(caught.value)


def test_engines_whose_ports_meet_are_named() -> None:
    ports = assign_ports(0, {**NONE_GIVEN, "engine_port": 9000, "engine_metrics_port": 9002}, num_engines=2)

    with pytest.raises(
        PortError, match=r"port 9002 \(engine 1's gRPC, --engine-port\) is that of the engine's /metrics"
    ):
        require_free_ports("127.0.0.1", ports, num_engines=2)


def test_a_base_port_leaves_room_for_every_engine() -> None:
    last = MAX_BASE_PORT - 14

    assert assign_ports(last, NONE_GIVEN, num_engines=8)["engine_metrics_port"] + 14 == 65535
    with pytest.raises(PortError, match=f"--base-port {last + 1} is not within 0 to {last} with --engines 8"):
        assign_ports(last + 1, NONE_GIVEN, num_engines=8)
    with pytest.raises(PortError, match="--engine-port 65530 is not within 0 to 65521 with --engines 8"):
        assign_ports(0, {**NONE_GIVEN, "engine_port": 65530}, num_engines=8)


def test_the_check_reads_the_arguments_of_serve(taken: int) -> None:
    with pytest.raises(SystemExit, match=f"port {taken} .*--http-port"):
        main(["--demo", "--base-port", "0", f"--http-port={taken}", "--drain-grace-s", "5"])
    with pytest.raises(SystemExit, match=f"port {taken} .engine 1's gRPC, --engine-port"):
        main(["--demo", "--engines", "2", "--base-port", "0", "--engine-port", str(taken - 2)])


def test_make_serve_finds_a_taken_port_before_it_installs_anything(taken: int, tmp_path: Path) -> None:
    # No packages but the standard library's: what a fresh machine has.
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys._base_executable)"], capture_output=True, text=True
    )
    command = ["make", "serve", f"VENV={tmp_path}/venv", f"PYTHON={bare.stdout.strip()}"]
    arguments = f"SERVE_ARGS=--base-port 0 --port {taken}"

    # Not as a part of the `make` that may run this test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    done = subprocess.run(
        [*command, arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode != 0
    assert f"port {taken} (the gateway's gRPC, --port) is taken" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "venv").exists()


def test_serve_finds_a_taken_port_before_it_fetches_anything(taken: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "loraplex_client",
        "serve",
        "--demo",
        "--base-port",
        "0",
        "--engine-port",
        str(taken),
    ]
    environment = {**os.environ, "LORAPLEX_CACHE": str(tmp_path / "cache")}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 1
    assert f"port {taken} (the engine's gRPC, --engine-port) is taken" in done.stderr
    assert not (tmp_path / "cache").exists()
