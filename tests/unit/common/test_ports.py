"""Ports are looked at before anything expensive."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_common.ports import problem_of, require_free

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another socket listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_taken_port_is_named_with_the_flag_that_changes_it(taken: int) -> None:
    with pytest.raises(
        OSError, match=f"port {taken} of 127.0.0.1 is taken by another process: choose another with --x"
    ):
        require_free("127.0.0.1", {"--free": 0, "--x": taken})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_taken_on_the_loopback_is_taken_for_every_host_that_includes_it(taken: int, host: str) -> None:
    assert problem_of(host, taken) == "is taken by another process"


def test_a_port_whose_last_server_has_just_gone_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        client = socket.create_connection(address)
        server.accept()[0].close()  # closes first, and waits in TIME_WAIT
    client.close()

    assert problem_of(*address) is None


def test_a_host_that_does_not_exist_is_no_traceback() -> None:
    assert "cannot be listened on" in (problem_of("no-such-host.invalid", 8500) or "")


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("loraplex_gateway", "--port"),
        ("loraplex_gateway", "--http-port"),
        ("loraplex_gateway", "--metrics-port"),
        ("loraplex_engine", "--port"),
        ("loraplex_engine", "--metrics-port"),
        ("loraplex_adapter_store", "--port"),
        ("loraplex_adapter_store", "--metrics-port"),
    ],
)
def test_a_service_names_its_taken_port_before_it_reads_a_model(module: str, flag: str, taken: int) -> None:
    ports = ("--port", "--metrics-port", *(("--http-port",) if "gateway" in module else ()))
    others = [word for port in ports for word in (port, "0")]
    arguments = ["--model", "/nowhere", "--redis-url", "redis://127.0.0.1:1", *others, flag, str(taken)]

    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode != 0
    assert f"port {taken} of 127.0.0.1 is taken by another process: choose another with {flag}" in done.stderr
    assert "Traceback" not in done.stderr
