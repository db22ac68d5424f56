"""Calls to an adapter store at a steady rate, however long each takes; each is counted from when it was due."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.ids import DEFAULT_LABEL
from support.many_names import digest_of, name_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from support.store_rig import StoreClient

SHARES = {"get": 0.85, "list": 0.05, "move": 0.10}
"""Shares of the kinds of calls. A list is a page of 100 names somewhere in the table."""


class Load:
    """Open-loop load on a store.

    Args:
        client: The store.
        num_names: Names 0 to ``num_names`` - 1 have two revisions each.
        seed: Seed of the draws.

    Attributes:
        seconds: Kind -> latencies, from when the call was due.
        failures: Kind -> messages of calls that failed.
    """

    def __init__(self, client: StoreClient, num_names: int, *, seed: int = 1) -> None:
        self._stub = client.stub
        self._num_names = num_names
        self._random = random.Random(seed)
        self._pages: list[str] = []
        self._moved: dict[int, int] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.failures: dict[str, list[str]] = defaultdict(list)

    async def prepare(self, most: int = 50) -> None:
        """Walk through some pages: later lists begin at their tokens."""
        token = ""
        for _ in range(most):
            self._pages.append(token)
            page = await self._stub.ListAdapters(
                pb.AdapterStoreServiceListAdaptersRequest(page_size=100, page_token=token)
            )
            token = page.next_page_token
            if not token:
                return

    async def run(self, rate: float, seconds: float) -> None:
        """Send calls for some time and wait for all answers."""
        kinds = self._random.choices(list(SHARES), list(SHARES.values()), k=round(rate * seconds))
        await self._send(kinds, rate)

    async def run_one_kind(self, kind: str, rate: float, seconds: float) -> None:
        """Send calls of one kind for some time."""
        await self._send([kind] * round(rate * seconds), rate)

    async def _send(self, kinds: list[str], rate: float) -> None:
        calls: dict[str, Callable[[], Awaitable[None]]] = {"get": self._get, "list": self._list, "move": self._move}
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, kind in enumerate(kinds):
                due = began + number / rate
                if (early := due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                group.create_task(self._timed(kind, due, calls[kind]))

    async def _timed(self, kind: str, due: float, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except Exception as error:  # every kind of failure is counted and reported
            self.failures[kind].append(f"{error}"[:200])
        else:
            self.seconds[kind].append(time.perf_counter() - due)

    async def _get(self) -> None:
        number = self._random.randrange(self._num_names)
        found = await self._stub.GetAdapter(pb.GetAdapterRequest(name=name_of(number)))
        assert found.adapter.name == name_of(number)
        assert found.HasField("revision")

    async def _list(self) -> None:
        token = self._random.choice(self._pages)
        page = await self._stub.ListAdapters(pb.AdapterStoreServiceListAdaptersRequest(page_size=100, page_token=token))
        assert len(page.adapters) == min(100, self._num_names)

    async def _move(self) -> None:
        number = self._random.randrange(self._num_names)
        self._moved[number] = version = 1 - self._moved.get(number, 1)
        alias = adapter_pb2.Alias(name=name_of(number), label=DEFAULT_LABEL, revision=digest_of(number, version))
        moved = await self._stub.SetAlias(pb.SetAliasRequest(alias=alias))
        assert moved.adapter.name == name_of(number)
