"""The tool that says where a test run's CPU seconds go."""

from __future__ import annotations

import contextlib
import subprocess
import sys

from support.cpu_times import CpuTimes, Spent, cpu_s, tables
from support.waiting import eventually_sync


def test_a_child_is_counted_while_it_runs_and_after_its_end_alike() -> None:
    before = cpu_s()
    busy = "import time\nwhile time.process_time() < 30: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as child:
        eventually_sync(lambda: cpu_s() - before > 0.2, what="a running child is counted")
        running = cpu_s()
        child.kill()

    assert cpu_s() >= running - 0.05  # /proc counts in ticks


def test_each_second_is_charged_once_to_what_is_innermost() -> None:
    times = CpuTimes()
    outer, inner = times._around("test"), times._around("fixture")
    next(outer)
    next(inner)
    eventually_sync(lambda: sum(range(1_000_000)) > 0 and cpu_s() - times._last[0] > 0.4, what="work")
    for generator in (inner, outer):
        with contextlib.suppress(StopIteration):
            generator.send(None)

    assert times.spent["fixture"].cpu_s > 0.4
    assert times.spent["test"].cpu_s < 0.2
    assert times.spent["fixture"].count == times.spent["test"].count == 1


def test_a_file_s_row_has_its_tests_with_their_set_up_and_a_fixture_has_its_own() -> None:
    rows = {
        "a.py::one": Spent(1.0, 2.0, 1),
        "set-up a.py::one": Spent(0.5, 0.5, 1),
        "a.py::two[x]": Spent(4.0, 4.0, 1),
        "fixture session stack:stack": Spent(2.0, 9.0, 2),
    }

    files = tables(rows)["files"]

    assert [(row["name"], row["cpu_s"]) for row in files] == [("a.py", 5.5), ("fixture session stack:stack", 2.0)]
