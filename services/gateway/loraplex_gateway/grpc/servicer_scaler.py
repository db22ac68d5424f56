"""KEDA's external scaler: what waits for engines of a base model, and how full they are, over the whole fleet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from loraplex.keda import externalscaler_pb2, externalscaler_pb2_grpc
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.scaling.settings import ScalerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from loraplex_gateway.engines.link import EngineLink
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.scaling.demand import DemandBoard
    from loraplex_gateway.text.models import ModelCatalog

QUEUE_TOKENS: Final = "loraplex-queue-tokens"
"""Prompt tokens that no engine has computed, on engines and gateways."""
PAGE_USAGE: Final = "loraplex-page-usage"
"""Percent of an engine's pages that cannot be had by eviction, added up over the engines."""
LOOK_EVERY_S: Final = 1.0


class ScalerServicer(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Answers an autoscaler. Values are the fleet's, so that value / target is the number of engines that are needed.

    Args:
        catalog: Base models.
        pool: The engines.
        board: What waits on gateways.
    """

    def __init__(self, catalog: ModelCatalog, pool: EnginePool, board: DemandBoard) -> None:
        self._catalog, self._pool, self._board = catalog, pool, board

    async def IsActive(
        self, request: externalscaler_pb2.ScaledObjectRef, context: grpc.aio.ServicerContext[Any, Any]
    ) -> externalscaler_pb2.IsActiveResponse:
        """Tell whether any request runs or waits."""
        return externalscaler_pb2.IsActiveResponse(result=await self._is_active(self._fingerprint(request)))

    async def StreamIsActive(
        self, request: externalscaler_pb2.ScaledObjectRef, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[externalscaler_pb2.IsActiveResponse]:
        """Tell it now and whenever it changes."""
        fingerprint, told = self._fingerprint(request), None
        while True:
            is_active = await self._is_active(fingerprint)
            if is_active != told:
                told = is_active
                yield externalscaler_pb2.IsActiveResponse(result=is_active)
            await asyncio.sleep(LOOK_EVERY_S)

    async def GetMetricSpec(
        self, request: externalscaler_pb2.ScaledObjectRef, context: grpc.aio.ServicerContext[Any, Any]
    ) -> externalscaler_pb2.GetMetricSpecResponse:
        """Name both metrics, with what an engine is to have of each."""
        settings = ScalerSettings.read(request.scalerMetadata)
        self._catalog.select(settings.model)
        return externalscaler_pb2.GetMetricSpecResponse(
            metricSpecs=[
                _spec(QUEUE_TOKENS, settings.queue_tokens),
                _spec(PAGE_USAGE, 100 * settings.page_usage),
            ]
        )

    async def GetMetrics(
        self, request: externalscaler_pb2.GetMetricsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> externalscaler_pb2.GetMetricsResponse:
        """Return one metric over all engines and gateways."""
        fingerprint = self._fingerprint(request.scaledObjectRef)
        if request.metricName == QUEUE_TOKENS:
            value = float(await self._queue_tokens(fingerprint))
        elif request.metricName == PAGE_USAGE:
            value = sum(map(_page_percent, self._links(fingerprint)))
        else:
            raise InvalidParameterError(
                f"metricName is {request.metricName!r}: the metrics are {QUEUE_TOKENS} and {PAGE_USAGE}",
                field="metricName",
            )
        return externalscaler_pb2.GetMetricsResponse(
            metricValues=[
                externalscaler_pb2.MetricValue(
                    metricName=request.metricName, metricValue=round(value), metricValueFloat=value
                )
            ]
        )

    def _fingerprint(self, asked: externalscaler_pb2.ScaledObjectRef) -> str:
        return self._catalog.select(ScalerSettings.read(asked.scalerMetadata).model).fingerprint

    def _links(self, fingerprint: str) -> list[EngineLink]:
        return [link for link in self._pool.links if link.record.base_fingerprint == fingerprint]

    async def _is_active(self, fingerprint: str) -> bool:
        if any(link.load for link in self._links(fingerprint)):
            return True
        return bool((await self._board.waiting(fingerprint)).requests)

    async def _queue_tokens(self, fingerprint: str) -> int:
        on_engines = sum(link.report.queued_uncached_tokens for link in self._links(fingerprint))
        return on_engines + (await self._board.waiting(fingerprint)).tokens


def _spec(name: str, target: float) -> externalscaler_pb2.MetricSpec:
    return externalscaler_pb2.MetricSpec(metricName=name, targetSize=max(1, round(target)), targetSizeFloat=target)


def _page_percent(link: EngineLink) -> float:
    report = link.report
    return 100.0 * (report.pages_kv + report.pages_pinned) / report.pages_total if report.pages_total else 0.0
