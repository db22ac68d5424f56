"""Decides which faults happen and when, by one seed, and waits after each fault until requests are answered again."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from loraplex_client import AsyncClient
from loraplex_common.errors import LoraplexError
from support.soak.fleet import Role
from support.soak.truth import STABLE
from support.waiting import eventually

if TYPE_CHECKING:
    import random

    from support.soak.abuse import Abuse
    from support.soak.book import Book
    from support.soak.faults import Faults
    from support.soak.fleet import Fleet, Part

MAX_PAUSE_S: Final = 2.0
RECOVERED_S: Final = 60.0
PROBE_S: Final = 10.0
PAIR_SHARE: Final = 0.25
# From here on the first part of each kind keeps its process, so that there is a long life whose memory can be judged.
SPARING_AFTER: Final = 0.34


class Director:
    """Runs faults; each round has every kind once, in random order, some of them two at a time."""

    def __init__(self, fleet: Fleet, faults: Faults, abuse: Abuse, book: Book, rng: random.Random) -> None:
        self._fleet = fleet
        self._faults = faults
        self._abuse = abuse
        self._book = book
        self._rng = rng
        self._bag: list[str] = []

    async def run(self, seconds: float) -> None:
        """Cause faults for that long."""
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) < seconds:
            if passed_s > SPARING_AFTER * seconds:
                self._faults.spared = frozenset(f"{role.value}0" for role in Role)
            kinds = [self._next_kind()]
            if self._rng.random() < PAIR_SHARE and (second := self._next_kind()).split()[-1] != kinds[0].split()[-1]:
                kinds.append(second)
            await asyncio.gather(*(self._do(kind) for kind in kinds))
            await asyncio.sleep(self._rng.random() * MAX_PAUSE_S)

    def _next_kind(self) -> str:
        if not self._bag:
            self._bag = [*self._faults.kinds(), *self._faults.valkey_kinds(), *self._abuse.kinds()]
            self._rng.shuffle(self._bag)
        return self._bag.pop()

    async def _do(self, kind: str) -> None:
        on_parts, on_valkey = self._faults.kinds(), self._faults.valkey_kinds()
        if kind in on_parts:
            victim = self._faults.victim(kind)
            fault = self._book.begin(kind, victim.name)
            await on_parts[kind](victim)
        else:
            fault = self._book.begin(kind, "valkey" if kind in on_valkey else "clients")
            await (on_valkey | self._abuse.kinds())[kind]()
        fault.healed_s = time.monotonic()
        if not await self._recovered():
            self._book.wrong(f"{RECOVERED_S:.0f} s after {kind} of {fault.part} not all is well")
        fault.recovered_s = time.monotonic()

    async def _recovered(self) -> bool:
        """Wait until every gateway answers with an adapter."""
        try:
            async with asyncio.timeout(RECOVERED_S):
                await asyncio.gather(*(self._answers(gateway) for gateway in self._fleet.gateways))
                await eventually(self._fleet.valkey_answers, timeout_s=RECOVERED_S)
        except (TimeoutError, AssertionError):
            return False
        return True

    async def _answers(self, gateway: Part) -> None:
        async with AsyncClient(gateway.grpc) as client:
            while True:
                with suppress(LoraplexError):
                    await client.generate_once(
                        prompt_token_ids=[5],
                        max_new_tokens=1,
                        adapter=self._rng.choice(STABLE),
                        timeout=PROBE_S,
                    )
                    return
                await asyncio.sleep(0.05)
