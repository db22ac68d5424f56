"""The processes of a run, the cores that they have, and what a gateway's computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_bench.streams.account import Rung, Window, rung
from loraplex_bench.streams.shared_number import SharedNumber

if TYPE_CHECKING:
    import argparse

MIN_CORES_TO_SHARE_OUT: Final = 8
CORES_PER_WORKER: Final = 2
MAX_GATEWAY_CORES: Final = 4
# At the start of a rung, before it counts.
SETTLE_S: Final = 0.3
DEADLINE_S: Final = 60.0


def cores_of(part: str, *, workers: int = 1) -> list[int]:
    """Return the cores of a gateway with so many workers, or of the others; all of them where they are few."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < MIN_CORES_TO_SHARE_OUT:
        return cores
    return cores[: CORES_PER_WORKER * workers] if part == "gateway" else cores[MAX_GATEWAY_CORES:]


class Part:
    """A child process that runs Python, ended with its owner's block."""

    def __init__(self, command: list[str], *, cores: list[int], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        os.sched_setaffinity(self.process.pid, cores)  # not between fork and exec: this process has gRPC's threads

    def close(self) -> None:
        """End it, and with it its children, which see that it is gone."""
        self.process.terminate()
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read_addresses(self) -> dict[str, str]:
        """Wait for its ready line; return kind of port -> address."""
        assert self.process.stdout is not None
        ready = next((line for line in self.process.stdout if line.startswith("ready: ")), None)
        if ready is None:
            raise SystemExit(f"a part ended before it was ready: {self.process.args!r}")
        return dict(word.split("=", 1) for word in ready.split()[1:])

    def cpu_s(self) -> float:
        """Return what it has computed, all of its processes."""
        family, total = {self.process.pid}, 0
        for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            pid = int(stat.parent.name)
            if pid in family or int(fields[1]) in family:
                family.add(pid)
                total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")


class Gateway(Part):
    """A gateway.

    Args:
        model: Directory of the base model.
        tree: Where its code is, of another commit; None for this one's.
        workers: Its processes; 0 for a gateway that does not know the flag.
        module: What is run.

    Attributes:
        addresses: Kind of port -> address.
    """

    def __init__(self, model: str, *, tree: Path | None, workers: int, module: str = "loraplex_gateway") -> None:
        folders = ("services/gateway", "services/common", "proto/gen")
        paths = [] if tree is None else [(tree / folder).resolve() for folder in folders]
        flags = ["--model", model, "--port", "0", "--http-port", "0", "--metrics-port", "0", "--log-level", "warning"]
        flags += ["--drain-settle-s", "0", "--drain-grace-s", "1", "--engine-silence-s", "60"]
        flags += ["--workers", str(workers)] if workers > 1 else []
        super().__init__(
            ["-m", module, *flags],
            cores=cores_of("gateway", workers=max(1, workers)),
            environment={"PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])},
        )
        self.addresses = self.read_addresses()


class Direct:
    """Servers that give the clients what a gateway would, each a process: the streams without a gateway.

    Args:
        commands: What starts each server.

    Attributes:
        addresses: Kind of port -> addresses of all, with commas.
    """

    def __init__(self, commands: list[list[str]]) -> None:
        self._parts = [Part(command, cores=cores_of("others")) for command in commands]
        found = [part.read_addresses() for part in self._parts]
        self.addresses = {kind: ",".join(each[kind] for each in found) for kind in found[0]}

    def cpu_s(self) -> float:
        """Return what they have computed."""
        return sum(part.cpu_s() for part in self._parts)

    def close(self) -> None:
        """End them."""
        for part in self._parts:
            part.close()


class Load:
    """One turn: clients on all streams while the engines' pace rises.

    Args:
        script: Runs the parts.
        folder: Where the parts share numbers and leave what they saw.
        arguments: The script's.
        run: Part of the request ids.
    """

    def __init__(self, script: Path, folder: Path, arguments: argparse.Namespace, *, run: str) -> None:
        self._script = str(script)
        self._folder = folder
        self._arguments = arguments
        self._run = run
        self._pace = SharedNumber(folder / "pace")

    def run(self, gateway: Gateway | Direct, face: str) -> list[Rung]:
        """Return what happened at each pace, up to the first that was not kept up."""
        arguments = self._arguments
        target = gateway.addresses["http" if face == "sse" else "grpc"]
        names = [f"{self._run}-{n}" for n in range(arguments.clients)]
        share = ["--streams", str(arguments.streams // arguments.clients)]
        share += ["--connections", str(max(1, arguments.connections // arguments.clients))]
        where = ["--target", target, "--face", face, "--folder", str(self._folder)]
        self._set_pace(arguments.paces[0])
        clients = [
            Part([self._script, "client", *where, *share, "--name", name, "--run", name], cores=cores_of("others"))
            for name in names
        ]
        counts = [SharedNumber(self._folder / f"{name}.count") for name in names]
        try:
            self._wait_for(lambda: all(count.get() > 2 * arguments.streams / arguments.clients for count in counts))
            time.sleep(1.0)  # all have begun: what the last of them cost is no part of it
            windows = self._climb(gateway, counts)
            for client in clients:
                client.process.communicate("enough\n")
        finally:
            for client in clients:
                client.close()
        return self._account(windows, names)

    def _climb(self, gateway: Gateway | Direct, counts: list[SharedNumber]) -> list[Window]:
        windows: list[Window] = []
        for pace in self._arguments.paces:
            self._set_pace(pace)
            time.sleep(SETTLE_S)
            begin_s, cpu_s, before = time.monotonic(), gateway.cpu_s(), sum(count.get() for count in counts)
            time.sleep(self._arguments.rung_s)
            end_s = time.monotonic()
            windows.append(Window(pace, begin_s, end_s, gateway.cpu_s() - cpu_s))
            if sum(count.get() for count in counts) - before < 0.85 * pace * (end_s - begin_s):
                break
        self._set_pace(self._arguments.paces[0])
        return windows

    def _account(self, windows: list[Window], names: list[str]) -> list[Rung]:
        came: dict[str, list[list[int]]] = {}
        for name in names:
            came |= json.loads((self._folder / f"{name}.json").read_text())
        sent: dict[str, list[int]] = {}

        def have_all_ended() -> bool:
            sent.clear()
            for log in self._folder.glob("*.log"):
                sent.update(json.loads(line) for line in log.read_text().splitlines())
            return came.keys() <= sent.keys()

        self._wait_for(have_all_ended)
        for log in self._folder.glob("*.log"):
            log.write_text("")
        return [rung(window, sent, came) for window in windows]

    def _set_pace(self, tokens_per_s: float) -> None:
        self._pace.set(tokens_per_s / self._arguments.streams)

    def _wait_for(self, condition: object) -> None:
        assert callable(condition)
        until = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > until:
                raise SystemExit(f"{self._run}: the streams did not begin, or did not end, in {DEADLINE_S:.0f} s")
            time.sleep(0.1)
