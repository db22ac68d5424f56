"""What a gateway tells of its engines' page pools, followed; for ``loraplex top``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loraplex.v1 import engine_pb2, fleet_pb2, fleet_pb2_grpc
from loraplex_common.error_status import from_status
from loraplex_common.pool_view import PoolView

from loraplex_client._errors import translated
from loraplex_client._stream_thread import news_or_silence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loraplex_client._connection import Connection

FIRST_NEWS_S: Final = 5.0
SILENCE_S: Final = 1.0
"""A second without news is when engines that have told nothing are looked for again."""
SHOWN_DIGEST: Final = 12
PHASES: Final = {
    number: name.removeprefix("PHASE_").lower() for name, number in engine_pb2.PoolRequest.Phase.items() if number
}


@dataclass(slots=True)
class WatchedEngine:
    """One engine, by the news so far.

    Attributes:
        error: Why it shows nothing; empty if it does.
    """

    target: str
    info: engine_pb2.GetEngineInfoResponse = field(default_factory=engine_pb2.GetEngineInfoResponse)
    load: engine_pb2.LoadReport = field(default_factory=engine_pb2.LoadReport)
    pool: PoolView = field(default_factory=PoolView)
    error: str = "no answer yet"
    passed_over: str = ""


class FleetView:
    """All engines of a gateway.

    Attributes:
        engines: By id.
    """

    def __init__(self) -> None:
        self.engines: dict[str, WatchedEngine] = {}
        self._names: dict[str, str] = {}

    def apply(self, news: fleet_pb2.WatchFleetResponse) -> None:
        """Take news in."""
        if news.gone:
            self.engines.pop(news.engine_id, None)
            return
        engine = self.engines.setdefault(news.engine_id, WatchedEngine(news.target))
        self._names.update(news.adapter_names)
        engine.passed_over = news.passed_over
        if news.HasField("error"):
            engine.error, engine.pool, engine.load = (
                from_status(news.error).message,
                PoolView(),
                engine_pb2.LoadReport(),
            )
            return
        if news.HasField("info"):
            engine.info.CopyFrom(news.info)
        engine.error = ""
        engine.pool.apply(news.change)
        engine.load.CopyFrom(news.load)

    def name(self, digest: str) -> str:
        """Return an adapter's name; the digest's beginning if it has none."""
        return self._names.get(digest, digest[:SHOWN_DIGEST])

    def adapters(self) -> list[dict[str, Any]]:
        """Return the adapters on devices, all engines together, those asked for most first."""
        found: dict[str, dict[str, Any]] = {}
        for engine in self.engines.values():
            for holder, held in engine.pool.adapters.items():
                digest = held.adapter.digest
                new = {"digest": digest, "name": self.name(digest), "requests_per_s": 0.0, "pages": 0}
                entry = found.setdefault(digest, new | {"leases": 0, "engines": 0, "pinned": False})
                entry["requests_per_s"] += engine.pool.requests_per_s(holder)
                entry["pages"] += held.adapter.num_pages
                entry["leases"] += held.adapter.num_leases
                entry["engines"] += 1
                entry["pinned"] |= held.adapter.pinned
        return sorted(found.values(), key=lambda entry: (-entry["requests_per_s"], entry["name"]))

    def requests(self) -> list[dict[str, Any]]:
        """Return the open requests of all engines, the oldest of each engine first."""
        return [
            {
                "request_id": request.request_id,
                "engine_id": engine_id,
                "phase": PHASES.get(request.phase, ""),
                "adapters": [self.name(digest) for digest in request.adapter_digests],
                "whose": request.fairness_key,
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": request.output_tokens,
                "pages": request.num_pages,
            }
            for engine_id, engine in sorted(self.engines.items())
            for request in sorted(engine.pool.requests.values(), key=lambda request: request.holder)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        engines = [
            {
                "engine_id": engine_id,
                "target": engine.target,
                "model": engine.info.base_model.name,
                "backend": engine.info.backend,
                "numerics": engine.info.numerics,
                "running": engine.load.running,
                "waiting": engine.load.waiting,
                "queued_tokens": engine.load.queued_uncached_tokens,
                "tokens_per_s": round(engine.load.tokens_per_s, 1),
                "draining": engine.load.draining,
                "pages": engine.pool.num_pages_by_owner(),
                "passed_over": engine.passed_over,
                "error": engine.error,
            }
            for engine_id, engine in sorted(self.engines.items())
        ]
        return {"engines": engines, "adapters": self.adapters(), "requests": self.requests()}


def watch_fleet(connection: Connection) -> Iterator[FleetView]:
    """Yield the fleet again and again, after each news of it; the first time once every engine has told of itself.

    Raises:
        LoraplexError: If the gateway cannot be reached, or does not show its engines to this caller.
    """
    view = FleetView()
    with connection.open() as channel, translated(connection.target):
        stub = fleet_pb2_grpc.FleetServiceStub(channel)

        def listed() -> list[fleet_pb2.EngineState]:
            request = fleet_pb2.ListEnginesRequest()
            return list(stub.ListEngines(request, timeout=4 * FIRST_NEWS_S, metadata=connection.metadata).engines)

        call = stub.WatchFleet(fleet_pb2.WatchFleetRequest(), metadata=connection.metadata)
        try:
            yield from _followed(view, news_or_silence(call, SILENCE_S), listed)
        finally:
            call.cancel()


def _followed(
    view: FleetView,
    messages: Iterator[fleet_pb2.WatchFleetResponse | None],
    listed: Callable[[], list[fleet_pb2.EngineState]],
) -> Iterator[FleetView]:
    """Yield the view after each message, once the engines that answer have told of themselves."""
    engines, told, listed_at = listed(), set[str](), time.monotonic()
    awaited = _answering(engines)
    if not engines:
        yield view
    for news in messages:
        if news is not None:
            view.apply(news)
            told.add(news.engine_id)
        was_waiting = bool(awaited)
        if awaited and time.monotonic() - listed_at >= SILENCE_S:
            # The gateway says nothing of an engine that left before it was watched.
            awaited, listed_at = awaited & _answering(listed()), time.monotonic()
        awaited -= told
        if not awaited and (news is not None or was_waiting):
            yield view


def _answering(engines: list[fleet_pb2.EngineState]) -> set[str]:
    return {engine.engine_id for engine in engines if not engine.HasField("error")}
