"""What the gateways of all replicas have taken in of the name table, and which of them are waited for.

A gateway names itself when it opens `WatchAliases`, and says what it has taken in with `AcknowledgeAliases`, at whichever
replica. Both lie in Valkey, so that a change is answered by any replica once the gateways of all replicas serve it. The replica
that serves a gateway's stream holds a lease for it: it ends with the stream, or soon after the replica has died.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.wake_up import WakeUp

from loraplex_adapter_store.records import Position
from loraplex_adapter_store.repository import keys, watch_scripts
from loraplex_adapter_store.visibility import Visibility

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_log = get_logger()
LEASE_S: Final = 4.0
RENEW_S: Final = 1.0
LOOK_S: Final = 0.02
"""Time between two looks at what gateways have told other replicas."""
WATCHER_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def check_watcher_id(watcher_id: str) -> str:
    """Return a watcher's name.

    Raises:
        InvalidParameterError: If it is none.
    """
    if WATCHER_ID.fullmatch(watcher_id) is None:
        raise InvalidParameterError(
            f"{watcher_id[:80]!r} is not 1 to 128 letters, digits, '-', '_' and '.'", field="watcher_id"
        )
    return watcher_id


@dataclass(eq=False, slots=True)
class _Watch:
    """An open stream; its token is 0 until Valkey knows of it."""

    watcher_id: str
    token: int = 0


class Watchers:
    """The gateways that acknowledge what they have taken in."""

    def __init__(self, client: keys.Client) -> None:
        self._client = client
        self._watches: set[_Watch] = set()
        self._changed = WakeUp()
        self._looking = asyncio.Lock()
        self._next_look: asyncio.Task[dict[str, Position]] | None = None

    @asynccontextmanager
    async def watching(self, watcher_id: str) -> AsyncIterator[None]:
        """Hold a watcher's lease while its stream is open; one without a name is not waited for."""
        if not watcher_id:
            yield
            return
        watch = _Watch(watcher_id)
        self._watches.add(watch)
        try:
            await self._open(watch)
            yield
        finally:
            self._watches.discard(watch)
            await asyncio.shield(self._close(watch))

    async def acknowledge(self, watcher_id: str, position: Position) -> None:
        """Note what a watcher has taken in.

        Raises:
            StoreUnavailableError: If Valkey cannot be reached.
        """
        word = f"{position.history_id} {position.sequence}"
        with keys.translated():
            await self._client.eval(
                watch_scripts.ACKNOWLEDGE, 2, watch_scripts.LEASES, watch_scripts.KNOWN, watcher_id, word
            )
        self._changed.notify()

    async def wait(self, position: Position, timeout_s: float) -> Visibility:
        """Return once all gateways have taken a position in, or time is over.

        Raises:
            StoreUnavailableError: If Valkey cannot be reached.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout_s
        while True:
            changed = self._changed.next
            found = await self._look()
            late = sorted(each for each, known in found.items() if not _reaches(known, position))
            left_s = give_up_at - loop.time()
            if not late or left_s <= 0:
                return Visibility(tuple(sorted(found.keys() - set(late))), tuple(late), timeout_s)
            try:
                async with asyncio.timeout(min(LOOK_S, left_s)):
                    await changed.wait()
            except TimeoutError:
                continue

    async def run(self) -> None:
        """Renew the leases of the streams served here for ever."""
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._renew()
            except LoraplexError as error:
                _log.debug("leases of gateways' watches are not renewed", error=error.message)

    async def _renew(self) -> None:
        for watch in [each for each in self._watches if not each.token]:
            await self._open(watch)
        words = [word for each in self._watches if each.token for word in (each.watcher_id, each.token)]
        if words:
            names = (watch_scripts.LEASES, watch_scripts.HOLDERS)
            with keys.translated():
                await self._client.eval(watch_scripts.RENEW, len(names), *names, round(LEASE_S * 1000), *words)

    async def _open(self, watch: _Watch) -> None:
        names = (watch_scripts.LEASES, watch_scripts.HOLDERS, watch_scripts.TOKENS)
        lease_ms = round(LEASE_S * 1000)
        try:
            with keys.translated():
                watch.token = await self._client.eval(
                    watch_scripts.OPEN, len(names), *names, lease_ms, watch.watcher_id
                )
        except LoraplexError as error:  # names are served all the same
            _log.debug(
                "a gateway is not waited for until Valkey is back", watcher=watch.watcher_id, error=error.message
            )

    async def _close(self, watch: _Watch) -> None:
        if not watch.token:
            return
        names = (watch_scripts.LEASES, watch_scripts.HOLDERS, watch_scripts.KNOWN)
        try:
            with keys.translated():
                await self._client.eval(watch_scripts.CLOSE, len(names), *names, watch.watcher_id, watch.token)
        except LoraplexError as error:
            _log.debug("the lease of a gateway's watch ends by itself", watcher=watch.watcher_id, error=error.message)

    async def _look(self) -> dict[str, Position]:
        """Return the watchers and what they know, as read after this call; many that wait share a read."""
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._read_next(), name="look at watchers")
        return await asyncio.shield(self._next_look)

    async def _read_next(self) -> dict[str, Position]:
        async with self._looking:
            self._next_look = None  # what comes from now on needs a read that begins later
            names = (watch_scripts.LEASES, watch_scripts.HOLDERS, watch_scripts.KNOWN)
            with keys.translated():
                found = [word.decode() for word in await self._client.eval(watch_scripts.LOOK, len(names), *names)]
        return {watcher: _position(word) for watcher, word in zip(found[::2], found[1::2], strict=True)}


def _position(word: str) -> Position:
    history_id, _, sequence = word.rpartition(" ")
    return Position(history_id, int(sequence or 0))


def _reaches(known: Position, wanted: Position) -> bool:
    return known.history_id == wanted.history_id and known.sequence >= wanted.sequence
