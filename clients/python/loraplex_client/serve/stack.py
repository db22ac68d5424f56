"""Starts the parts in order, keeps them running, ends them in reverse.

A part that dies while starting ends the whole: there is something to mend. One that dies later is started again on the
same ports after a pause that doubles; one that dies too often ends the whole.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from loraplex_client.credentials.private_files import make_private_folder
from loraplex_client.serve.child import ChildError, ServiceChild
from loraplex_client.serve.config import Wiring

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_client.serve.config import ServeConfig
    from loraplex_client.serve.identity import ServeIdentity
    from loraplex_client.serve.valkey_child import ValkeyChild
    from loraplex_client.valkey_access import ValkeyAccess

Child: TypeAlias = "ServiceChild | ValkeyChild"
Report = Callable[[str], None]

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0
MAX_NUM_RESTARTS: Final = 5
RESTART_WINDOW_S: Final = 60.0
KILL_MARGIN_S: Final = 5.0  # on top of the grace that a service takes itself


class ServeError(RuntimeError):
    """A part could not be started or kept running; the message has the end of its log."""


class Stack:
    """All parts on this machine. Use it on the main thread's event loop.

    Args:
        config: What to run.
        report: Told in one line of each part that starts, dies or is started again.

    Attributes:
        grpc: Address of the gateway, once started.
        http: Address of its OpenAI-compatible port, once started.
        metrics: Address of its /metrics, once started.
        store: Address of the adapter store, once started.
        engines: Address of each engine, once started.
        engine_metrics: Address of each engine's /metrics, once started.
        profile: Client profile of this user for all of them, once started.
    """

    def __init__(self, config: ServeConfig, report: Report) -> None:
        self.grpc = self.http = self.metrics = self.store = ""
        self.engines: tuple[str, ...] = ()
        self.engine_metrics: tuple[str, ...] = ()
        self.profile: Path | None = None
        self._identity: ServeIdentity | None = None
        self._config = config
        self._report = report
        self._children: list[Child] = []
        self._supervisors: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all parts and return once all are ready; on failure everything is ended.

        Raises:
            ServeError: If a part ends before it is ready.
        """
        try:
            await self._start_all()
        except BaseException as error:
            await self.stop()
            if isinstance(error, ChildError):
                raise ServeError(str(error)) from error
            raise

    async def run(self) -> None:
        """Keep all parts running until cancelled.

        Raises:
            ServeError: If a part dies too often.
        """
        assert self._identity is not None, "started"
        self._supervisors = [asyncio.create_task(self._supervise(child)) for child in self._children]
        self._supervisors.append(asyncio.create_task(self._identity.keep_fresh(self._report)))
        try:
            await asyncio.gather(*self._supervisors)
        except ChildError as error:
            raise ServeError(str(error)) from error
        finally:
            await self._end_supervision()

    async def stop(self) -> None:
        """Drain and end all parts, the gateway first; nothing is left running."""
        await self._end_supervision()
        for child in reversed(self._children):
            await child.stop(self._config.drain_grace_s + KILL_MARGIN_S)
        if self._identity is not None:
            self._identity.close()

    def kill(self) -> None:
        """End all parts at once."""
        for child in self._children:
            child.kill()

    async def _start_all(self) -> None:
        from loraplex_client.serve.identity import ServeIdentity  # needs cryptography: the serve extra

        config = self._config
        log_dir = config.data_dir / "logs"
        try:
            make_private_folder(log_dir)  # logs name tenants and adapters
        except OSError as error:
            raise ChildError(f"{log_dir}: {error.strerror}") from error
        self._identity = ServeIdentity(
            config.data_dir, user_keys=config.user_keys, lifetime_s=config.certificate_lifetime_s
        )
        wiring = Wiring(valkey=config.valkey or await self._start_valkey(), identity=self._identity)
        store = ServiceChild(config.store(wiring), log_dir)
        await self._start(store)
        self.store = store.addresses["grpc"]
        numbers = range(len(config.engine_shares))
        engines = [ServiceChild(config.engine(wiring, self.store, number), log_dir) for number in numbers]
        gateway = ServiceChild(config.gateway(wiring, self.store), log_dir)
        try:
            async with asyncio.TaskGroup() as group:
                for child in (*engines, gateway):
                    group.create_task(self._start(child))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        self.engines = tuple(engine.addresses["grpc"] for engine in engines)
        self.engine_metrics = tuple(engine.addresses["metrics"] for engine in engines)
        self.grpc, self.http = gateway.addresses["grpc"], gateway.addresses["http"]
        self.metrics = gateway.addresses["metrics"]
        self.profile = self._identity.leave_profile(gateway=self.grpc, store=self.store, engines=self.engines)

    async def _start_valkey(self) -> ValkeyAccess:
        from loraplex_client.serve.valkey_child import ValkeyChild  # needs redis: the serve extra

        valkey = ValkeyChild(self._config.data_dir / "valkey")
        await self._start(valkey)
        return valkey.access

    async def _start(self, child: Child) -> None:
        self._children.append(child)
        self._report(f"starting {child.name}")
        await child.start()

    async def _supervise(self, child: Child) -> None:
        """Start a child again whenever it dies.

        Raises:
            ChildError: If it dies more than `MAX_NUM_RESTARTS` times within `RESTART_WINDOW_S`.
        """
        deaths: collections.deque[float] = collections.deque(maxlen=MAX_NUM_RESTARTS + 1)
        while True:
            how = await child.wait()
            deaths.append(time.monotonic())
            self._report(f"{child.name} died ({how}); its last words:\n{child.log_tail()}")
            while True:
                recent = [death for death in deaths if death > time.monotonic() - RESTART_WINDOW_S]
                if len(recent) > MAX_NUM_RESTARTS:
                    raise ChildError(
                        f"{child.name} died {len(recent)} times within {RESTART_WINDOW_S:.0f} s; its last words:\n"
                        f"{child.log_tail()}"
                    )
                await asyncio.sleep(min(FIRST_BACKOFF_S * 2 ** (len(recent) - 1), MAX_BACKOFF_S))
                try:
                    await child.start()
                except ChildError as error:
                    deaths.append(time.monotonic())
                    self._report(str(error))
                else:
                    self._report(f"{child.name} runs again")
                    break

    async def _end_supervision(self) -> None:
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        self._supervisors = []
