"""Waits until the engines that hold a revision hold the one that takes its place."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection

    from loraplex_adapter_store.attach.attached import AttachedEngines
    from loraplex_adapter_store.repository.engines import EngineHoldings

_log = get_logger()
LOOK_S: Final = 0.25
"""Time between two looks at engines of other replicas, whose holdings are known from Valkey."""
OFFER_S: Final = 1.0
"""Time between two offers to an engine: it declines one whose place requests wait for too."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """The engines that hold a new revision, and those that still hold only what it takes the place of; ids, sorted."""

    ready: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


class EngineReadiness:
    """Brings a revision to the engines of all replicas that need it."""

    def __init__(self, attached: AttachedEngines, holdings: EngineHoldings) -> None:
        self._attached = attached
        self._holdings = holdings

    async def wait(self, left: Collection[str], revision: str, timeout_s: float) -> Readiness:
        """Return once each attached engine that holds one of some revisions holds another one too, or time is over.

        An engine that goes, or drops what it held, is not waited for any more.

        Args:
            left: Digests of the revisions that are left.
            revision: Digest of the one that takes their place.
            timeout_s: The time.
        """
        loop = asyncio.get_running_loop()
        give_up_at, offered_at = loop.time() + timeout_s, -OFFER_S
        while True:
            changed = self._attached.residency.next
            state = await self._look(left, revision)
            now = loop.time()
            if not state.late or now >= give_up_at:
                return state
            if now - offered_at >= OFFER_S:
                await self._offer(state.late, revision)
                offered_at = now
            try:
                async with asyncio.timeout(min(LOOK_S, give_up_at - now)):
                    await changed.wait()
            except TimeoutError:
                continue

    async def _look(self, left: Collection[str], revision: str) -> Readiness:
        held = self._attached.held_by_engine()
        held |= await self._holdings.held_by_engine((revision, *left), without=held.keys())
        ready = sorted(engine for engine, digests in held.items() if revision in digests)
        late = sorted(e for e, digests in held.items() if revision not in digests and not digests.isdisjoint(left))
        return Readiness(tuple(ready), tuple(late))

    async def _offer(self, engines: Collection[str], revision: str) -> None:
        for engine in engines:
            if not self._attached.expect(engine, revision):
                await self._holdings.hint(engine, "expect", revision)
