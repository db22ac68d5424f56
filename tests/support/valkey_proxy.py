"""A unix socket before Valkey that does something at the n-th piece of commands that comes through."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class ValkeyProxy:
    """Passes bytes on; what a client sends at once is one step.

    Args:
        path: The socket to listen on.
        upstream: Valkey's socket.

    Attributes:
        num_steps: Steps since `arm` or `forget`.
    """

    def __init__(self, path: Path, upstream: str) -> None:
        self._path = path
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._at = 0
        self._is_after = False
        self._happens: Callable[[], object] | None = None
        self.num_steps = 0

    @property
    def has_happened(self) -> bool:
        """Whether nothing is to happen any more."""
        return self._happens is None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def arm(self, step: int, happens: Callable[[], object], *, after: bool) -> None:
        """Have something happen at a step, before it reaches Valkey or when Valkey answers; the answer does not come through."""
        self.num_steps, self._at, self._is_after, self._happens = 0, step, after, happens

    def forget(self) -> None:
        """Count from 0, and let nothing happen."""
        self.num_steps, self._happens = 0, None

    def happen(self) -> None:
        """Have it happen now, unless it has."""
        happens, self._happens = self._happens, None
        if happens is not None:
            happens()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
                pending: list[bool] = []
                ways = [
                    asyncio.create_task(self._commands(reader, up_writer, pending)),
                    asyncio.create_task(self._answers(up_reader, writer, pending)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                up_writer.close()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _commands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pending: list[bool]) -> None:
        while data := await reader.read(1 << 20):
            self.num_steps += 1
            if self._happens is not None and self.num_steps >= self._at:
                if not self._is_after:
                    self.happen()
                    return
                pending.append(True)
            writer.write(data)
            await writer.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pending: list[bool]) -> None:
        while data := await reader.read(1 << 20):
            if pending:
                self.happen()
                return
            writer.write(data)
            await writer.drain()
