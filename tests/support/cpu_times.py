"""Says where a test run's CPU seconds go: `pytest -p support.cpu_times --cpu-times FILE`.

Wall seconds depend on what else the machine does; CPU seconds hardly do. Counted are this process, its children that
have ended, and all its descendants that still run, so a server that a session fixture started is charged to the tests
that made it work. A fixture's set-up is charged to the fixture and not to the test that happened to ask first.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_OUTPUT = "cpu_times"


@dataclass
class Spent:
    """CPU seconds and wall seconds, and how many times they were taken."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    count: int = 0

    def add(self, other: Spent) -> None:
        self.cpu_s += other.cpu_s
        self.wall_s += other.wall_s
        self.count += other.count


def _descendants(pid: int) -> Iterator[int]:
    for task in _entries(f"/proc/{pid}/task"):
        for child in _text(f"/proc/{pid}/task/{task}/children").split():
            yield int(child)
            yield from _descendants(int(child))


def _entries(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:  # it ended meanwhile
        return []


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _cpu_s_of(pid: int) -> float:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * _TICK_S if fields else 0.0


def cpu_s() -> float:
    """CPU seconds of this process and all its descendants, ended and running ones."""
    own = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return own + sum(map(_cpu_s_of, _descendants(os.getpid())))


class CpuTimes:
    """Charges what is spent between two looks at the clocks to the innermost test phase or fixture under way."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self._under_way: list[str] = []
        self._last = (cpu_s(), time.monotonic())

    def _charge(self, count: int) -> None:
        now = (cpu_s(), time.monotonic())
        if self._under_way:
            self.spent[self._under_way[-1]].add(Spent(now[0] - self._last[0], now[1] - self._last[1], count))
        self._last = now

    def _around(self, name: str) -> Generator[None, Any, Any]:
        self._charge(0)
        self._under_way.append(name)
        try:
            return (yield)
        finally:
            self._charge(1)
            self._under_way.pop()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        where = fixturedef.func.__module__.rpartition(".")[2]
        return (yield from self._around(f"fixture {fixturedef.scope} {where}:{fixturedef.argname}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self._around(f"set-up {item.nodeid}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self._around(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self._around(f"teardown {item.nodeid}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, Any, Any]:
        return (yield from self._around("collection"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[_OUTPUT] = {name: asdict(spent) for name, spent in self.spent.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        for name, spent in getattr(node, "workeroutput", {}).get(_OUTPUT, {}).items():
            self.spent[name].add(Spent(**spent))


def _file_of(name: str) -> str:
    return name if name.startswith("fixture ") else name.partition("::")[0].rpartition(" ")[2]


def tables(spent: dict[str, Spent]) -> dict[str, list[dict[str, Any]]]:
    """By file (fixtures stand for themselves) and by test, most CPU seconds first."""
    files: dict[str, Spent] = defaultdict(Spent)
    for name, times in spent.items():
        files[_file_of(name)].add(times)
    return {title: _ranked(rows) for title, rows in (("files", files), ("tests", spent))}


def _ranked(rows: dict[str, Spent]) -> list[dict[str, Any]]:
    ranked = sorted(rows.items(), key=lambda row: -row[1].cpu_s)
    return [
        {"name": name, "cpu_s": round(s.cpu_s, 3), "wall_s": round(s.wall_s, 3), "count": s.count} for name, s in ranked
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", metavar="FILE", help="write CPU and wall seconds by file and by test to FILE, JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTimes(), "cpu-times")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the most expensive files and write both tables."""
    times = config.pluginmanager.get_plugin("cpu-times")
    assert isinstance(times, CpuTimes)
    made = tables(times.spent)
    total = sum(row["cpu_s"] for row in made["files"])
    terminalreporter.write_line(f"CPU seconds of tests, fixtures and collection: {total:.1f}. Most of them:")
    for row in made["files"][:25]:
        terminalreporter.write_line(f"{row['cpu_s']:8.1f} CPU s {row['wall_s']:8.1f} wall s  {row['name']}")
    path = config.getoption("--cpu-times")
    if path:
        Path(path).write_text(json.dumps(made, indent=1) + "\n")
