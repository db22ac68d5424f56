"""A service's process: ready line, orderly stop, and nothing left of its children."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import asyncio
from loraplex_common.lifecycle import announce_ready, stop_on_signals
async def main():
    stop = stop_on_signals()
    announce_ready("engine", grpc="127.0.0.1:1", metrics="127.0.0.1:2")
    await stop.wait()
    print("draining", flush=True)
    {after}
asyncio.run(main())
"""


def start(after: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(after=after)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_after_its_ready_line_with_zero(number: signal.Signals) -> None:
    with start("pass") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready: service=engine grpc=127.0.0.1:1 metrics=127.0.0.1:2\n"

        process.send_signal(number)

        assert process.stdout.readline() == "draining\n"
        assert process.wait(20) == 0


def test_a_second_signal_ends_a_drain_that_hangs() -> None:
    with start("await asyncio.Event().wait()") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.stdout.readline()

        process.send_signal(signal.SIGTERM)

        assert process.wait(20) == -signal.SIGTERM


PARENT = """
import subprocess, sys, time
from loraplex_common.child_process import owned_command
child = subprocess.Popen(owned_command([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]))
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_an_owned_child_dies_with_its_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (pid,) = lines - {"up"}
        parent.kill()

    deadline = time.monotonic() + 20
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.01)
