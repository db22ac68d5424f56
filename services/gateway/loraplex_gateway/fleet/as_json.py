"""News of an engine as the JSON that the page at /ui reads: the same as WatchFleet tells, without a wire type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex.v1 import engine_pb2
from loraplex_common.error_status import from_status

if TYPE_CHECKING:
    from loraplex_gateway.fleet.news import News

_PHASES: Final = {
    number: name.removeprefix("PHASE_").lower() for name, number in engine_pb2.PoolRequest.Phase.items() if number
}


def as_json(news: News) -> dict[str, Any]:
    """Return what is told of one engine.

    `runs` has four numbers for each run of pages (first page, pages, owner as in engine.proto PageOwner, holder), `progress`
    four for each request that is further (holder, tokens computed, tokens generated, pages): a second in which little
    happens is a few bytes, whatever the size of the pool.
    """
    message = news.message
    told: dict[str, Any] = {"engine": message.engine_id, "target": message.target}
    if message.gone:
        return told | {"gone": True}
    if message.HasField("error"):
        error = from_status(message.error)
        return told | {"error": {"message": error.message, "reason": error.reason}}
    if message.HasField("info"):
        told["info"] = _info(message.info)
    return told | {
        "passed_over": message.passed_over,
        "load": _load(message.load),
        "names": dict(message.adapter_names),
        **_change(message.change),
    }


def _info(info: engine_pb2.GetEngineInfoResponse) -> dict[str, Any]:
    return {
        "model": info.base_model.name,
        "backend": info.backend,
        "numerics": info.numerics,
        "block_tokens": info.block_tokens,
        "version": info.version,
    }


def _load(load: engine_pb2.LoadReport) -> dict[str, Any]:
    return {
        "running": load.running,
        "waiting": load.waiting,
        "queued_tokens": load.queued_uncached_tokens,
        "tokens_per_s": round(load.tokens_per_s, 2),
        "draining": load.draining,
    }


def _change(change: engine_pb2.PoolChange) -> dict[str, Any]:
    runs = zip(change.run_starts, change.run_lengths, change.run_owners, change.run_holders, strict=True)
    progress = zip(
        change.progress_holders, change.progress_computed, change.progress_outputs, change.progress_pages, strict=True
    )
    told: dict[str, Any] = {
        "runs": [number for run in runs for number in run],
        "requests": [_request(request) for request in change.requests],
        "ended": list(change.ended_requests),
        "progress": [number for each in progress for number in each],
        "adapters": [_adapter(adapter) for adapter in change.adapters],
        "left": list(change.gone_adapters),
        "left_out": [change.requests_left_out, change.adapters_left_out],
    }
    if change.snapshot:
        told |= {"snapshot": True, "num_pages": change.num_pages}
    return told


def _request(request: engine_pb2.PoolRequest) -> dict[str, Any]:
    return {
        "holder": request.holder,
        "id": request.request_id,
        "phase": _PHASES.get(request.phase, ""),
        "adapters": list(request.adapter_digests),
        "whose": request.fairness_key,
        "prompt": request.prompt_tokens,
        "computed": request.computed_tokens,
        "output": request.output_tokens,
        "pages": request.num_pages,
        "age_s": round(request.age.ToNanoseconds() * 1e-9, 1),
    }


def _adapter(adapter: engine_pb2.PoolAdapter) -> dict[str, Any]:
    held = adapter.adapter
    return {
        "holder": adapter.holder,
        "digest": held.digest,
        "pages": held.num_pages,
        "rank": held.max_rank,
        "pinned": held.pinned,
        "leases": held.num_leases,
        "rate": adapter.requests_per_s,
        "half_life_s": adapter.half_life.seconds + adapter.half_life.nanos * 1e-9,
    }
