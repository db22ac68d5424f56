"""The engines this gateway knows, one link each, kept in step with the registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.wake_up import WakeUp

from loraplex_gateway.engines.absences import Absences
from loraplex_gateway.engines.alike import Alike
from loraplex_gateway.engines.link import EngineLink
from loraplex_gateway.engines.link_state import LinkState
from loraplex_gateway.engines.routing import Candidate, choose
from loraplex_gateway.engines.silence import SILENCE_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.registry import EngineRecord

    from loraplex_gateway.adapters.names import ResolvedAdapter
    from loraplex_gateway.text.models import ModelCatalog

_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkOptions:
    """What the links of a pool have in common.

    Attributes:
        gateway_id: Said in every hello.
        max_buffered_tokens: Bound of each request's buffer.
        silence_s: As of `EngineLink`.
        dial: Opens a channel to an engine's address; anew for each session, with the credentials of then.
    """

    gateway_id: str
    max_buffered_tokens: int
    silence_s: float = SILENCE_S
    dial: Callable[[str], grpc.aio.Channel] = open_channel


class EnginePool:
    """Owns the links: opens one per listed engine, and closes it once the engine is gone and nothing runs on it.

    An engine is gone once the registry no longer lists it and it does not show on its session that it lives: leases also
    run out because Valkey takes no renewals.

    Args:
        catalog: Base models; engines of others are left alone.
        links: What all links have in common.
        failover_wait_s: How long an engine that does not take requests is expected to come (back).
        arrival_wait_s: How long a new request waits for an engine where there is none; 0 does not.
        allows_mixed_numerics: Whether a request may go to engines whose numerics differ.
        clock: Monotonic seconds.

    Attributes:
        failover_wait_s: As above.
        arrival_wait_s: As above.
    """

    def __init__(
        self,
        catalog: ModelCatalog,
        links: LinkOptions,
        *,
        failover_wait_s: float = 60.0,
        arrival_wait_s: float = 0.0,
        allows_mixed_numerics: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog, self._options = catalog, links
        self.failover_wait_s, self.arrival_wait_s = failover_wait_s, arrival_wait_s
        self._absences = Absences(failover_wait_s, clock)
        self._alike = Alike(allows_mixed=allows_mixed_numerics)
        self._links: dict[str, EngineLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._listed: set[str] = set()
        self._changed = WakeUp()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def links(self) -> tuple[EngineLink, ...]:
        """All links, whatever their state."""
        return tuple(self._links.values())

    @property
    def changed(self) -> asyncio.Event:
        """Set once an engine comes, goes, or changes whether it takes requests; take it before looking."""
        return self._changed.next

    @property
    def has_candidate(self) -> bool:
        """Whether any engine takes requests."""
        return any(self._is_candidate(link) for link in self._links.values())

    @property
    def is_dialling(self) -> bool:
        """Whether a session with any listed engine is still to be opened."""
        return any(
            link.state is LinkState.CONNECTING and link.engine_id in self._listed for link in self._links.values()
        )

    def has_engine(self, fingerprint: str) -> bool:
        """Return whether an engine of a base model takes requests."""
        return any(
            self._is_candidate(link) for link in self._links.values() if link.record.base_fingerprint == fingerprint
        )

    def is_expected(self, fingerprint: str, begun: str | None = None) -> bool:
        """Whether an engine that may serve a request, as in `choose`, is listed but still being dialled."""
        return any(
            link.state is LinkState.CONNECTING and link.engine_id in self._listed
            for link in self._of_model(fingerprint, begun)
        )

    def expected_until(self, fingerprint: str, begun: str | None = None) -> float:
        """Return until when an engine that takes no requests now may do so, and serve a request as in `choose`."""
        return self._absences.expected_until(
            lambda record: (
                record.base_fingerprint == fingerprint and (begun is None or self._alike.may_serve(record, begun))
            )
        )

    def unlike(self, fingerprint: str, begun: str) -> tuple[str, ...]:
        """Return the numerics of engines that take requests, but not one that began on an engine of other numerics."""
        links = [link for link in self._links.values() if link.record.base_fingerprint == fingerprint]
        others = [link.record for link in links if self._is_candidate(link)]
        return tuple(sorted({each.numerics for each in others if not self._alike.may_serve(each, begun)}))

    def passed_over(self, record: EngineRecord) -> str:
        """Return why an engine gets no new requests although it is registered; empty if it may get some."""
        return self._alike.reason(record)

    def num_resident(self, digest: str) -> int:
        """Return on how many engines' devices an adapter is."""
        return sum(digest in link.resident for link in self._links.values())

    def max_model_len(self, fingerprint: str) -> int | None:
        """Return the longest sequence any engine of a base model serves; None if none is known."""
        return max((link.record.max_model_len for link in self._of_model(fingerprint)), default=None)

    def sync(self, records: Mapping[str, EngineRecord], lapsed: Mapping[str, EngineRecord] | None = None) -> None:
        """Take the registry's truth: open, update and close links.

        Args:
            records: Engines whose lease is good.
            lapsed: Engines whose lease may have run out because it could not be renewed: they are asked themselves.
        """
        served = self._served({**(lapsed or {}), **records})
        self._listed = set(served) & set(records)
        self._alike.update(served[engine_id] for engine_id in sorted(self._listed or served))
        for engine_id, record in served.items():
            if engine_id in self._links:
                self._links[engine_id].record = record
            else:
                self._open(record)
        for engine_id in set(self._links) - set(served):
            link = self._links[engine_id]
            is_idle = link.num_in_flight == 0 or link.state is not LinkState.OPEN
            if is_idle and not link.is_proven:
                self._close(engine_id)
        self._notify()

    def can_constrain(self, fingerprint: str) -> bool | None:
        """Return whether an engine of a base model constrains outputs; None if there is no engine."""
        return any(found) if (found := [link.record.constrains for link in self._of_model(fingerprint)]) else None

    def can_sum(self, fingerprint: str) -> bool | None:
        """Return whether an engine of a base model adds up several adapters; None if there is no engine."""
        return any(found) if (found := [link.record.sums_adapters for link in self._of_model(fingerprint)]) else None

    def choose(
        self,
        fingerprint: str,
        *,
        adapters: Sequence[ResolvedAdapter],
        affinity_key: str,
        num_tokens: int,
        excluded: frozenset[str],
        is_constrained: bool = False,
        begun: str | None = None,
    ) -> EngineLink | None:
        """Return the engine that should take a request of `num_tokens` tokens so far, or None if none can.

        One that has `begun` on an engine of some numerics goes on where they are equal; None has not begun.
        """
        links = {
            link.engine_id: link
            for link in self._of_model(fingerprint, begun)
            if self._is_candidate(link)
            and link.engine_id not in excluded
            and link.record.max_model_len > num_tokens
            and (link.record.constrains or not is_constrained)
            and (link.record.sums_adapters or len(adapters) < 2)
        }
        # Where the operator allows others, equal ones are still the first choice.
        links = {each: link for each, link in links.items() if link.record.numerics == begun} or links
        # One that is about to be taken for lost gets nothing new while there are others.
        links = {each: link for each, link in links.items() if not link.is_quiet} or links
        candidates = [
            Candidate(engine_id=engine_id, load=link.load, missing_bytes=_missing_bytes(link, adapters))
            for engine_id, link in links.items()
        ]
        # Sorted and without weights: neither changes which pages an engine loads.
        all_of_them = ",".join(sorted(adapter.digest for adapter in adapters))
        chosen = choose(candidates, adapters=all_of_them, affinity_key=affinity_key)
        return None if chosen is None else links[chosen]

    async def run(self) -> None:
        """Wait for ever; a link that dies of a bug of ours raises here, so that the service ends loudly."""
        await self._failure

    async def close(self) -> None:
        """Close all links; requests still running on them fail."""
        tasks = [*self._tasks.values(), *self._closing]
        self._tasks, self._links, self._listed = {}, {}, set()
        await cancel_and_wait(*tasks)

    def check_integrity(self) -> None:
        """Raise if any link has lost a slot.

        Raises:
            RuntimeError: With the counts.
        """
        for link in self._links.values():
            link.check_integrity()

    def _of_model(self, fingerprint: str, begun: str | None = None) -> list[EngineLink]:
        """Return the engines of a base model that may serve a request as far as their numerics count."""
        return [
            link
            for link in self._links.values()
            if link.record.base_fingerprint == fingerprint and self._alike.may_serve(link.record, begun)
        ]

    def _is_candidate(self, link: EngineLink) -> bool:
        return link.is_candidate and (link.engine_id in self._listed or link.is_proven)

    def _served(self, records: Mapping[str, EngineRecord]) -> dict[str, EngineRecord]:
        return {
            engine_id: record
            for engine_id, record in records.items()
            if self._catalog.by_fingerprint(record.base_fingerprint) is not None
        }

    def _open(self, record: EngineRecord) -> None:
        model = self._catalog.by_fingerprint(record.base_fingerprint)
        assert model is not None
        link = EngineLink(
            record,
            gateway_id=self._options.gateway_id,
            max_buffered_tokens=self._options.max_buffered_tokens,
            on_change=self._notify,
            silence_s=self._options.silence_s,
            dial=self._options.dial,
        )
        self._links[record.engine_id] = link
        task = asyncio.create_task(link.run(), name=f"session-{record.engine_id}")
        task.add_done_callback(self._link_ended)
        self._tasks[record.engine_id] = task
        _log.info("engine found", engine_id=record.engine_id, target=record.target, model=model.name)

    def _close(self, engine_id: str) -> None:
        del self._links[engine_id]
        task = self._tasks.pop(engine_id)
        task.cancel()
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        _log.info("engine gone", engine_id=engine_id)

    def _link_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._failure.done():
            self._failure.set_exception(error)

    def _notify(self) -> None:
        self._absences.update(
            {engine_id: self._is_candidate(link) for engine_id, link in self._links.items()},
            {engine_id: link.record for engine_id, link in self._links.items()},
        )
        self._changed.notify()


def _missing_bytes(link: EngineLink, adapters: Sequence[ResolvedAdapter]) -> int:
    """Return the bytes of adapters that an engine would have to load; one that tells no size has at least a byte."""
    return sum(max(1, adapter.num_bytes) for adapter in adapters if not link.holds(adapter.digest))
