"""Names that are created, deleted and moved while they are used, and the meanings that they may have at any time."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_client import AsyncClient
from loraplex_common.errors import LoraplexError
from support.soak.expectations import is_expected_of_the_catalogue
from support.soak.truth import LABEL, MOVING, NUM_VARIANTS, PASSING

if TYPE_CHECKING:
    import random

    from support.soak.book import Book, Stream
    from support.soak.fleet import Fleet
    from support.soak.truth import Truth

PAUSE_S: Final = 2.0
CALL_S: Final = 60.0
# Longest age of an answer: undisturbed, and after a fault that kept a gateway from learning of the change.
LAG_S: Final = 5.0
LAG_AFTER_FAULT_S: Final = 45.0


@dataclass(slots=True)
class Change:
    """A name's new meaning; an empty revision means none.

    Attributes:
        acknowledged_s: When the change was acknowledged; infinity if it is unknown whether it was made.
    """

    revision: str
    sent_s: float
    acknowledged_s: float = math.inf


class Catalogue:
    """Changes names through both stores.

    Attributes:
        longest_lag_s: Age of the oldest meaning of a name that an answer still had.
    """

    def __init__(self, fleet: Fleet, truth: Truth, book: Book, rng: random.Random) -> None:
        self._fleet = fleet
        self._truth = truth
        self._book = book
        self._rng = rng
        self.longest_lag_s = 0.0
        self._changes: dict[str, list[Change]] = {}
        for name in MOVING:
            self._changes[f"{name}:{LABEL}"] = [Change(truth.revisions[f"{name}-0"], 0.0, 0.0)]
        for name in PASSING:
            self._changes[name] = [Change("", 0.0, 0.0)]

    async def run(self, over: asyncio.Event) -> None:
        """Change names until the soak ends."""
        clients = [AsyncClient(store_target=store.grpc) for store in self._fleet.stores]
        try:
            while not over.is_set():
                client = self._rng.choice(clients)
                await (self._move(client) if self._rng.random() < 0.5 else self._pass(client))
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), self._rng.random() * PAUSE_S)
        finally:
            for client in clients:
                await client.close()

    def check(self, adapter: str, revision: str, stream: Stream) -> None:
        """Enter an error if a name cannot have meant this revision when a stream began."""
        name, _, pinned = adapter.partition("@")
        if pinned or name not in self._changes:
            wanted = pinned or (self._truth.revisions[name] if name else "")
            if revision != wanted:
                self._book.wrong(f"{adapter} is {wanted}, answered by {revision}")
        elif (lag_s := self._lag_s(name, revision, stream)) > 0:
            self._enter_lag(name, revision, lag_s, stream)

    def may_be_missing(self, adapter: str, stream: Stream) -> bool:
        """Return whether a name may have been unknown when a stream began; enters an error if it had to be known."""
        if adapter not in PASSING:
            return False
        if (lag_s := self._lag_s(adapter, "", stream)) > 0:
            self._enter_lag(adapter, "nothing", lag_s, stream)
        return True

    def _lag_s(self, name: str, revision: str, stream: Stream) -> float:
        """Return for how long a name had had another meaning when a stream began."""
        changes = self._changes[name]
        latest = max(i for i, change in enumerate(changes) if change.acknowledged_s <= stream.began_s)
        if any(change.revision == revision for change in changes[latest:]):
            return 0.0
        past = [i for i, change in enumerate(changes[:latest]) if change.revision == revision]
        if not past:
            return math.inf
        superseded = (c.acknowledged_s for c in changes[past[-1] + 1 :] if c.acknowledged_s < math.inf)
        return stream.began_s - min(superseded)

    def _enter_lag(self, name: str, revision: str, lag_s: float, stream: Stream) -> None:
        self._book.counts["answers with an earlier meaning"] += 1
        self.longest_lag_s = max(self.longest_lag_s, lag_s)
        now = time.monotonic()
        disturbers = self._book.disturbers(stream.began_s - lag_s if lag_s < math.inf else now, now)
        if lag_s > (LAG_AFTER_FAULT_S if disturbers else LAG_S):
            self._book.wrong(f"{name} had not meant {revision} for {lag_s:.1f} s; {sorted(disturbers)}")

    async def _move(self, client: AsyncClient) -> None:
        name, variant = self._rng.choice(MOVING), self._rng.randrange(NUM_VARIANTS)
        change = self._enter(f"{name}:{LABEL}", self._truth.revisions[f"{name}-{variant}"])
        await self._do("moved labels", change, client.adapters.alias(name, LABEL, change.revision))

    async def _pass(self, client: AsyncClient) -> None:
        name = self._rng.choice(PASSING)
        if self._changes[name][-1].revision:
            change = self._enter(name, "")
            await self._do("deletions", change, client.adapters.delete(name, force=True))
            return
        folder, is_upload = self._truth.folder(name), self._rng.random() < 0.5
        change = self._enter(name, self._truth.revisions[name])
        if is_upload:
            await self._do("uploads", change, client.adapters.upload(name, folder))
        else:
            await self._do("imports", change, client.adapters.import_directory(name, folder))

    def _enter(self, name: str, revision: str) -> Change:
        change = Change(revision, time.monotonic())
        self._changes[name].append(change)
        return change

    async def _do(self, what: str, change: Change, call: object) -> None:
        try:
            async with asyncio.timeout(CALL_S):
                await call  # type: ignore[misc]
        except TimeoutError:
            self._book.wrong(f"hung: {what} for {CALL_S} s")
        except LoraplexError as error:
            self._book.counts[f"{what} refused: {error.reason}"] += 1
            disturbers = self._book.disturbers(change.sent_s, time.monotonic())
            is_repeated = error.reason == "ADAPTER_NOT_FOUND" and what == "deletions"  # of a deletion that was in doubt
            if not is_repeated and not is_expected_of_the_catalogue(error.reason, disturbers):
                self._book.wrong(f"unexpected: {what}: {error.reason}: {error}; {sorted(disturbers)}")
            if is_repeated:
                change.acknowledged_s = time.monotonic()
        else:
            self._book.counts[what] += 1
            change.acknowledged_s = time.monotonic()
