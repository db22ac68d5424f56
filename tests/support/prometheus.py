"""A real Prometheus that scrapes our services, and its linter; `tests/tools/ensure-prometheus.sh` provides both."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TOOLS: Final = Path(__file__).parents[2] / ".cache" / "prometheus"
READY_TIMEOUT_S: Final = 30.0
QUERY_TIMEOUT_S: Final = 30.0
PAUSE_S: Final = 0.05


def tool(name: str) -> str:
    """Return the path of ``prometheus`` or ``promtool``, or skip the test."""
    found = shutil.which(name) or shutil.which(name, path=str(TOOLS))
    if found is None:
        pytest.skip(f"no {name} on this machine: run tests/tools/ensure-prometheus.sh")
    return found


def lint(text: str) -> list[str]:
    """Return promtool's complaints about a page in Prometheus' text format.

    Raises:
        AssertionError: If it cannot be parsed.
    """
    command = [tool("promtool"), "check", "metrics"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode in (0, 3), result.stderr  # 3: understood, but not liked
    return result.stderr.splitlines()


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return an expression's value now: one entry per series, with ``metric`` and ``value``."""
        return list(self._get("query", query=expression)["result"])

    def eventually(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression once there are any.

        Raises:
            AssertionError: If none comes in time.
        """
        deadline = time.monotonic() + QUERY_TIMEOUT_S
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"nothing for {expression}; targets: {self.targets()}"
            time.sleep(PAUSE_S)
        return found

    def targets(self) -> list[dict[str, Any]]:
        """Return the scraped targets, with the last error of each."""
        return list(self._get("targets")["activeTargets"])

    def _get(self, path: str, **parameters: str) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]


@contextmanager
def running_prometheus(directory: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Scrape targets, job -> ``host:port``, five times a second while the block runs."""
    program = tool("prometheus")
    jobs = [{"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()]
    config = directory / "prometheus.yml"  # JSON is YAML
    settings = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    config.write_text(json.dumps({"global": settings, "scrape_configs": jobs}))
    port = _free_port()
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/-/ready", process, directory / "prometheus.log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(PAUSE_S)
