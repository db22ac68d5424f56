"""The parent of a gateway's workers: starts them, starts one that dies anew, sums their metrics, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Final

import msgspec
from loraplex_common.auth import Authenticator
from loraplex_common.child_process import owned_command
from loraplex_common.exposition import Audience, Exposition
from loraplex_common.lifecycle import announce_ready, stop_on_signals
from loraplex_common.log import get_logger
from loraplex_common.metrics_http import MetricsServer
from loraplex_common.tasks import Supervisor
from loraplex_common.vllm_metrics import FLEET_LABEL

from loraplex_gateway.workers.control import Question, ask
from loraplex_gateway.workers.setup import WorkerSetup, new_gateway_id
from loraplex_gateway.workers.shared_ports import SharedPorts
from loraplex_gateway.workers.snapshot import MergedMetrics, Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.config import GatewayConfig

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 15.0
# A worker that has run for so long and dies is started at once.
LASTS_S: Final = 60.0
LINE_BYTES: Final = 64 * 1024

_log = get_logger()


class WorkerFailedError(OSError):
    """A worker ended before it was ready; it has said why."""


class Worker:
    """One process after another in one place.

    Args:
        arguments: The parent's own, which its workers have too.
        setup: What all workers share; the gateway id is each process's own.
    """

    def __init__(self, arguments: Sequence[str], setup: WorkerSetup) -> None:
        self._arguments = arguments
        self.setup = setup
        self.last: Snapshot | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start a process and return once it is ready.

        Raises:
            WorkerFailedError: If it ends before.
        """
        self.setup = msgspec.structs.replace(self.setup, gateway_id=new_gateway_id())
        told = msgspec.json.encode(self.setup).decode()
        command = [sys.executable, "-m", "loraplex_gateway.worker", told, *self._arguments]
        process = self._process = await asyncio.create_subprocess_exec(
            *owned_command(command),
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
            start_new_session=True,  # a Ctrl-C is the parent's to pass on
        )
        assert process.stdout is not None
        async for line in process.stdout:
            if line.startswith(b"ready: "):
                return
        raise WorkerFailedError(f"a worker ended with {await process.wait()} before it was ready")

    async def wait(self) -> int:
        """Wait for the process's end and return its exit code."""
        assert self._process is not None
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def pulse(self) -> None:
        """Return once it has shown that its event loop runs, or that there is none: one that died is started anew.

        Raises:
            TimeoutError: If it hangs.
        """
        try:
            await ask(self.setup.control, Question(is_pulse=True), bool)
        except TimeoutError:
            raise
        except OSError as error:
            _log.debug("a worker is not there", gateway_id=self.setup.gateway_id, cause=str(error))

    async def scrape(self) -> None:
        """Look at its metrics; those of before stay where it does not answer."""
        try:
            self.last = await ask(self.setup.control, Question(), Snapshot)
        except OSError as error:
            _log.warning("a worker does not show its metrics", gateway_id=self.setup.gateway_id, cause=str(error))


class Parent:
    """A gateway of several processes.

    Args:
        config: The gateway's configuration.
        arguments: The command line that it was read from.
    """

    def __init__(self, config: GatewayConfig, arguments: Sequence[str]) -> None:
        self._config = config
        self._arguments = arguments
        self._ports = SharedPorts(config.host, {"--port": config.port, "--http-port": config.http_port})
        self._folder = tempfile.mkdtemp(prefix="loraplex-gateway-")
        self._merged = MergedMetrics()
        self._ended: list[Snapshot] = []
        self._workers: list[Worker] = []
        self._authenticator = Authenticator.from_file(config.api_keys_file)
        exposition = Exposition(
            self._merged,
            audience=Audience(config.metrics_key, self._authenticator),
            vllm_labels={"engine": FLEET_LABEL},
            refresh=self._refresh,
        )
        self._metrics = MetricsServer(exposition, config.host, config.metrics_port, pulse=self._pulse)
        self._supervisor = Supervisor()

    async def serve(self) -> None:
        """Run the workers until SIGTERM or SIGINT, then have all of them drain.

        Raises:
            OSError: If a port is taken, or a worker cannot start.
            BackgroundTaskError: If a background task dies.
        """
        stop = stop_on_signals()
        try:
            await self._start()
            await self._supervisor.run_until(stop)
        finally:
            await self._supervisor.close()
            await self._end()

    async def _start(self) -> None:
        port, http_port = self._ports.numbers.values()
        metrics_port = await self._metrics.start()
        setup = WorkerSetup(
            gateway_id="",
            port=port,
            http_port=http_port,
            metrics_port=metrics_port,
            folder=self._folder,
            models=tuple(map(str, self._config.model)),
            served_model_name=self._config.served_model_name,
        )
        self._workers = [Worker(self._arguments, setup) for _ in range(self._config.workers)]
        self._supervisor.spawn(self._authenticator.follow(), name="credentials")
        await asyncio.gather(*[worker.start() for worker in self._workers])
        for worker in self._workers:
            self._supervisor.spawn(self._keep(worker), name="worker")
        host = self._config.host
        ports = {"grpc": port, "http": http_port, "metrics": metrics_port}
        announce_ready("gateway", **{kind: f"{host}:{number}" for kind, number in ports.items()})

    async def _keep(self, worker: Worker) -> None:
        """Start a process anew whenever it dies, at once if it had run for long."""
        clock, pause_s = asyncio.get_running_loop().time, FIRST_PAUSE_S
        while True:
            started_at = clock()
            code = await worker.wait()
            if clock() - started_at > LASTS_S:
                pause_s = FIRST_PAUSE_S
            _log.error("a worker has died", gateway_id=worker.setup.gateway_id, code=code, again_in_s=pause_s)
            if worker.last is not None:
                self._ended = [_together([*self._ended, worker.last.lasting])]
                worker.last = None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            with contextlib.suppress(WorkerFailedError):  # told by `wait`, which returns at once
                await worker.start()

    async def _refresh(self) -> None:
        await asyncio.gather(*[worker.scrape() for worker in self._workers])
        self._merged.snapshots = [*(worker.last for worker in self._workers if worker.last is not None), *self._ended]

    async def _pulse(self) -> None:
        await asyncio.gather(*[worker.pulse() for worker in self._workers])

    async def _end(self) -> None:
        """Have the workers drain, however long they may take, and give everything back."""
        for worker in self._workers:
            worker.signal(signal.SIGTERM)
        await asyncio.gather(*[worker.wait() for worker in self._workers], return_exceptions=True)
        await self._metrics.stop()
        self._ports.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _together(snapshots: list[Snapshot]) -> Snapshot:
    """Return the sums of what has ended, so that it stays as small as one."""
    merged = MergedMetrics()
    merged.snapshots = snapshots
    return merged.snapshot()
