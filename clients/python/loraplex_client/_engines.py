"""What engines say of themselves, to us or to their gateway, for ``loraplex status``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex.v1 import adapter_pb2, engine_pb2, engine_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from loraplex_common.error_status import from_status

from loraplex_client._errors import translated

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_common.errors import LoraplexError

    from loraplex_client._connection import Connection

TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldAdapter:
    """An adapter that an engine holds.

    Attributes:
        is_on_device: Whether it can be computed with; else it lies in the host arena.
        num_pages: Pages or arena slots it takes.
        num_leases: Running requests that use it.
    """

    digest: str
    is_on_device: bool
    num_pages: int
    num_leases: int
    is_pinned: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """One engine and its load; ``pages_adapter`` can be evicted, ``pages_pinned`` are leased or pinned.

    Attributes:
        numerics: What loading did to the base model's numbers; empty of an engine of an earlier version.
        passed_over: Why the gateway sends it no new requests; empty if it may, or if the engine itself was asked.
    """

    engine_id: str
    target: str
    base_model: str
    backend: str
    dtype: str
    numerics: str
    passed_over: str
    page_bytes: int
    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_kv: int
    pages_adapter: int
    pages_pinned: int
    tokens_per_s: float
    is_draining: bool
    adapters: tuple[HeldAdapter, ...]


def engine_status(connection: Connection) -> EngineStatus:
    """Ask an engine.

    Raises:
        LoraplexError: If it cannot be reached.
    """
    metadata = connection.metadata
    with connection.open() as channel, translated(connection.target):
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        info = stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), timeout=TIMEOUT_S, metadata=metadata)
        watch = stub.WatchLoad(engine_pb2.WatchLoadRequest(), timeout=TIMEOUT_S, metadata=metadata)
        load = next(watch).load
        watch.cancel()
        held: list[engine_pb2.ResidentAdapter] = []
        request = engine_pb2.ListAdaptersRequest()
        while True:
            page = stub.ListAdapters(request, timeout=TIMEOUT_S, metadata=metadata)
            held.extend(page.adapters)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    return _status(connection.target, info, load, held)


def fleet_status(connection: Connection) -> tuple[list[EngineStatus], dict[str, LoraplexError]]:
    """Ask a gateway for its engines: those that answered it, and target -> error of those that did not.

    Raises:
        LoraplexError: If the gateway cannot be reached or does not show its engines.
    """
    with connection.open() as channel, translated(connection.target):
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        response = stub.ListEngines(fleet_pb2.ListEnginesRequest(), timeout=4 * TIMEOUT_S, metadata=connection.metadata)
    engines = [
        _status(state.target, state.info, state.load, state.adapters, passed_over=state.passed_over)
        for state in response.engines
        if not state.HasField("error")
    ]
    return engines, {state.target: from_status(state.error) for state in response.engines if state.HasField("error")}


def _status(
    target: str,
    info: engine_pb2.GetEngineInfoResponse,
    load: engine_pb2.LoadReport,
    held: Iterable[engine_pb2.ResidentAdapter],
    *,
    passed_over: str = "",
) -> EngineStatus:
    return EngineStatus(
        engine_id=info.engine_id,
        target=target,
        base_model=info.base_model.name,
        backend=info.backend,
        dtype=info.geometry.dtype,
        numerics=info.numerics,
        passed_over=passed_over,
        page_bytes=info.geometry.page_bytes,
        running=load.running,
        waiting=load.waiting,
        pages_total=load.pages_total,
        pages_free=load.pages_free,
        pages_kv=load.pages_kv,
        pages_adapter=load.pages_adapter,
        pages_pinned=load.pages_pinned,
        tokens_per_s=load.tokens_per_s,
        is_draining=load.draining,
        adapters=tuple(_held(adapter) for adapter in held),
    )


def _held(adapter: engine_pb2.ResidentAdapter) -> HeldAdapter:
    return HeldAdapter(
        digest=adapter.digest,
        is_on_device=adapter.tier == adapter_pb2.TIER_DEVICE,
        num_pages=adapter.num_pages,
        num_leases=adapter.num_leases,
        is_pinned=adapter.pinned,
    )
