"""Faults of the fleet's processes; each one is undone by the method that causes it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from support.soak.fleet import VALKEY_BYTES, Role
from support.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from support.soak.book import Book
    from support.soak.fleet import Fleet, Part

HUNG_STATUS: Final = 70
HANG_ENDS_S: Final = 30.0
MIN_STOP_S, MAX_STOP_S = 2.0, 7.0
MAX_VALKEY_STOP_S: Final = 5.0
FULL_S: Final = 4.0
MOMENT_S: Final = 0.5


class Faults:
    """Faults of processes, by name; `kinds` has all of them.

    Attributes:
        spared: Names of parts whose process is not ended, so that its memory can be watched for long.
    """

    def __init__(self, fleet: Fleet, book: Book, rng: random.Random) -> None:
        self._fleet = fleet
        self._book = book
        self._rng = rng
        self.spared: frozenset[str] = frozenset()

    def kinds(self) -> dict[str, Callable[[Part], Awaitable[None]]]:
        """Return the faults of one part, by kind."""
        return {
            **{f"kill {role.value}": self.kill for role in Role},
            **{f"stop {role.value}": self.stop for role in Role},
            **{f"restart {role.value}": self.restart for role in (Role.STORE, Role.GATEWAY)},
            "hang engine": self.hang,
            "drain engine": self.drain,
        }

    def valkey_kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return the faults of Valkey, by kind."""
        return {"kill valkey": self.kill_valkey, "stop valkey": self.stop_valkey, "fill valkey": self.fill_valkey}

    def victim(self, kind: str) -> Part:
        """Return a random part for a kind of fault; not a spared part if the fault would end it."""
        role = kind.rpartition(" ")[2]
        parts = [part for part in self._fleet.parts if part.role.value == role]
        if not kind.startswith("stop"):
            parts = [part for part in parts if part.name not in self.spared]
        return self._rng.choice(parts)

    async def kill(self, part: Part) -> None:
        """End a process as a crash does, and start it again after a moment."""
        await part.kill()
        await asyncio.sleep(self._rng.random() * MOMENT_S)
        await part.start()

    async def stop(self, part: Part) -> None:
        """Stop a process for seconds, its connections open."""
        part.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(MIN_STOP_S, MAX_STOP_S))
        finally:
            part.signal(signal.SIGCONT)

    async def restart(self, part: Part) -> None:
        """Replace a process as a rollout does."""
        if (status := await part.stop()) != 0:
            self._book.wrong(f"{part.name} ended with {status} when asked to")
        await part.start()

    async def hang(self, engine: Part) -> None:
        """Make an engine's step hang: the process must end, and is started again."""
        assert engine.hang_file is not None
        engine.hang_file.touch()
        engine.is_leaving = True
        try:
            await eventually(lambda: not engine.process.is_running, timeout_s=HANG_ENDS_S)
        except AssertionError:  # no step was due, so none could hang
            self._book.counts["hangs without work"] += 1
            engine.is_leaving = False
            return
        finally:
            engine.hang_file.unlink()
        if (status := await asyncio.to_thread(engine.process.wait)) != HUNG_STATUS:
            self._book.wrong(f"{engine.name} hung and ended with {status}")
        await engine.start()

    async def drain(self, engine: Part) -> None:
        """Drain an engine for good, and replace it."""
        engine.is_leaving = True
        request = engine_pb2.DrainRequest()
        request.deadline.FromSeconds(2)
        async with open_channel(engine.grpc) as channel:
            try:
                await engine_pb2_grpc.EngineServiceStub(channel).Drain(request, timeout=30)
            except grpc.aio.AioRpcError as error:
                self._book.wrong(f"{engine.name} does not drain: {error.code().name}: {error.details()}")
        await self.restart(engine)

    async def kill_valkey(self) -> None:
        """End Valkey as a crash does, and start it again with what is on disk."""
        self._fleet.valkey.kill()
        await asyncio.sleep(self._rng.random() * 2)
        self._fleet.revive_valkey()

    async def stop_valkey(self) -> None:
        """Stop Valkey for seconds."""
        pid = self._fleet.valkey.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(1.0, MAX_VALKEY_STOP_S))
        finally:
            os.kill(pid, signal.SIGCONT)

    async def fill_valkey(self) -> None:
        """Leave Valkey no memory for new data."""
        await self._fleet.limit_valkey(1)
        try:
            await asyncio.sleep(FULL_S)
        finally:
            await self._fleet.limit_valkey(VALKEY_BYTES)
