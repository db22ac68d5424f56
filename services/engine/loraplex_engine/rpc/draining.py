"""Takes an engine out of service and back, so that its step loop and the registry agree in the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from loraplex_common.errors import DrainingError

if TYPE_CHECKING:
    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.rpc.registration import Registration


class Draining:
    """Whether an engine takes requests, as its operators want it. Belongs to the event loop.

    If calls overlap, the later one wins: each call announces, once it has been carried out, what is wanted by then.

    Args:
        engine: The engine.

    Attributes:
        registration: The record that is told of every change; None without a registry.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_wanted = False
        self._is_shutting_down = False
        self.registration: Registration | None = None

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests, let the others finish for ``timeout_s``, then end them; return how many were ended.

        Raises:
            ConflictError: If `undrain` comes first.
        """
        self._is_wanted = True
        ended = self._engine.drain(timeout_s)
        await self._announce()
        return await asyncio.wrap_future(ended)

    async def undrain(self) -> bool:
        """Take requests again, whether a drain is under way or over; return whether there was one.

        Raises:
            DrainingError: If the engine drains because its process ends.
        """
        if self._is_shutting_down:
            raise DrainingError(
                "the engine is shutting down: start it again instead", drop_reason="rejected-shutting-down"
            )
        was_draining, self._is_wanted = self._is_wanted, False
        await asyncio.wrap_future(self._engine.undrain())
        await self._announce()
        return was_draining

    async def begin_shutdown(self) -> None:
        """Tell the registry that the engine takes no requests any more."""
        self._is_wanted = self._is_shutting_down = True
        await self._announce()

    async def _announce(self) -> None:
        if self.registration is not None:
            await self.registration.announce(is_draining=self._is_wanted)
