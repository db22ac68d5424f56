"""Real proxies in front of gateways, started with the files of deploy/proxies; `tests/tools/ensure-proxies.sh` provides them.

A test replaces addresses and, where it says so, times. A text that a test replaces but the file does not have fails the test.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ROOT: Final = Path(__file__).parents[2]
CONFIGS: Final = ROOT / "deploy" / "proxies"
TOOLS: Final = ROOT / ".cache" / "proxies"
PLACES: Final = (TOOLS / "usr" / "sbin", TOOLS / "envoy", Path("/usr/sbin"), Path("/usr/local/sbin"))
LIBRARIES: Final = TOOLS / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"
READY_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0
PAUSE_S: Final = 0.02

KINDS: Final = ("haproxy", "nginx", "envoy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One gateway as a proxy reaches it; ``host:port`` each."""

    grpc: str
    http: str


@dataclass(frozen=True, slots=True)
class _Kind:
    file: str
    command: Callable[[str, Path], list[str]]
    addresses: Callable[[int, int, Sequence[Backend]], dict[str, str]]


def _haproxy_addresses(grpc: int, http: int, backends: Sequence[Backend]) -> dict[str, str]:
    replaced = {"bind 0.0.0.0:8500": f"bind 127.0.0.1:{grpc}", "bind 0.0.0.0:8501": f"bind 127.0.0.1:{http}"}
    for number, backend in enumerate(backends, 1):
        name = f"gateway-{number}"
        replaced |= {f" {name}:8500": f" {backend.grpc}", f" {name}:8501": f" {backend.http}"}
    return replaced


def _nginx_addresses(grpc: int, http: int, backends: Sequence[Backend]) -> dict[str, str]:
    replaced = {"listen 8500": f"listen 127.0.0.1:{grpc}", "listen 8501": f"listen 127.0.0.1:{http}"}
    for number, backend in enumerate(backends, 1):
        name = f"gateway-{number}"
        replaced |= {f"server {name}:8500": f"server {backend.grpc}", f"server {name}:8501": f"server {backend.http}"}
    return replaced


def _envoy_addresses(grpc: int, http: int, backends: Sequence[Backend]) -> dict[str, str]:
    replaced = {}
    for port, mine in ((8500, grpc), (8501, http)):
        replaced[f"address: 0.0.0.0, port_value: {port}"] = f"address: 127.0.0.1, port_value: {mine}"
    for number, backend in enumerate(backends, 1):
        for port, target in ((8500, backend.grpc), (8501, backend.http)):
            host, _, theirs = target.rpartition(":")
            replaced[f"address: gateway-{number}, port_value: {port}"] = f"address: {host}, port_value: {theirs}"
    return replaced


def _haproxy(program: str, config: Path) -> list[str]:
    return [program, "-db", "-f", str(config)]


def _nginx(program: str, config: Path) -> list[str]:
    own = f"daemon off; pid {config.parent}/nginx.pid; error_log stderr;"
    return [program, "-e", "stderr", "-p", str(config.parent), "-c", str(config), "-g", own]


def _nginx_folders(folder: Path) -> str:
    """Return where nginx keeps bodies for a while: a package that is only unpacked lacks the folder that it was built with."""
    uses = {"client_body": "client-body", "proxy": "proxy", "fastcgi": "fastcgi", "uwsgi": "uwsgi", "scgi": "scgi"}
    return "".join(f"    {name}_temp_path {folder}/{path};\n" for name, path in uses.items())


def _envoy(program: str, config: Path) -> list[str]:
    return [program, "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"]


_KINDS: Final = {
    "haproxy": _Kind("haproxy.cfg", _haproxy, _haproxy_addresses),
    "nginx": _Kind("nginx.conf", _nginx, _nginx_addresses),
    "envoy": _Kind("envoy.yaml", _envoy, _envoy_addresses),
}


def program(kind: str) -> str:
    """Return the path of a proxy, or skip the test."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, PLACES)])
    found = shutil.which(kind, path=path)
    if found is None:
        pytest.skip(f"no {kind} on this machine: run tests/tools/ensure-proxies.sh")
    return found


@dataclass(slots=True)
class Proxy:
    """A running proxy.

    Attributes:
        kind: One of `KINDS`.
        grpc: ``host:port`` of its gRPC port.
        http: Base URL of its HTTP port.
        config: The file that it was started with.
    """

    kind: str
    grpc: str
    http: str
    config: Path
    log_path: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def read_again(self) -> None:
        """Have nginx read its files again, which no other needs to be told."""
        if self.kind == "nginx":
            self.process.send_signal(signal.SIGHUP)

    def log(self) -> str:
        """Return what it has written."""
        return self.log_path.read_text(errors="replace")


def replace_all(text: str, replaced: Mapping[str, str]) -> str:
    """Replace every occurrence of each text.

    Raises:
        AssertionError: If one does not occur.
    """
    for old, new in replaced.items():
        assert old in text, f"{old!r} is not in the proxy's file"
        text = text.replace(old, new)
    return text


@asynccontextmanager
async def running_proxy(
    kind: str,
    directory: Path,
    backends: Sequence[Backend],
    *,
    file: str | None = None,
    changes: Mapping[str, str] | None = None,
) -> AsyncIterator[Proxy]:
    """Run a proxy in front of gateways until the block ends.

    Args:
        kind: One of `KINDS`.
        directory: Gets its file and its log.
        backends: As many gateways as the file names.
        file: Another file of deploy/proxies than the plain one.
        changes: Texts of the file to replace besides addresses.
    """
    executable, known = program(kind), _KINDS[kind]
    name = file or known.file
    ports = (free_port(), free_port())
    text = replace_all((CONFIGS / name).read_text(), known.addresses(*ports, backends) | dict(changes or {}))
    folder = directory / f"{kind}-{ports[0]}"
    folder.mkdir()
    if kind == "nginx":
        text = replace_all(text, {"\nhttp {\n": f"\nhttp {{\n{_nginx_folders(folder)}"})
    config, log_path = folder / name, folder / "log"
    config.write_text(text)
    process = _started(known.command(executable, config), log_path)
    proxy = Proxy(kind, f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", config, log_path, process)
    try:
        for port in ports:
            await _wait_until_it_listens(proxy, port)
        yield proxy
    finally:
        await asyncio.to_thread(_stop, process)


def _started(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
    libraries = os.pathsep.join(filter(None, (str(LIBRARIES), os.environ.get("LD_LIBRARY_PATH"))))
    environment = os.environ | {"LD_LIBRARY_PATH": libraries}
    with log_path.open("wb") as log:
        return subprocess.Popen(command, cwd=log_path.parent, stdout=log, stderr=log, env=environment)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # the fast end, for each of them; nginx's workers go with it
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def free_port() -> int:
    """Return a port of the loopback that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def _wait_until_it_listens(proxy: Proxy, port: int) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert proxy.process.poll() is None, proxy.log()
            assert time.monotonic() < deadline, proxy.log()
            await asyncio.sleep(PAUSE_S)
        else:
            writer.close()
            return
