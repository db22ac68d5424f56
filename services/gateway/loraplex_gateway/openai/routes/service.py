"""What tools and probes ask: /health, /ping, /version, /load, and a sign to /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.rights import GATEWAY
from loraplex_common.version import package_version
from starlette.responses import PlainTextResponse, Response

from loraplex_gateway.openai.answers import Health, Load, Version
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.json_responses import json_response

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from starlette.requests import Request

    from loraplex_gateway.openai.context import HttpContext


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes about the service itself."""
    routes = _Service(context)
    return [
        OpenEndpoint(
            path="/metrics", handler=routes.metrics, summary="Say where metrics are.", answer=str, statuses=(404,)
        ),
        OpenEndpoint(
            path="/health",
            handler=routes.health,
            summary="Say whether requests can be served.",
            answer=Health,
            statuses=(200, 503),
        ),
        OpenEndpoint(path="/healthz", handler=routes.health, summary="As /health.", answer=Health, statuses=(200, 503)),
        OpenEndpoint(
            methods=("GET", "POST"),
            path="/ping",
            handler=routes.health,
            summary="As /health, for SageMaker.",
            answer=Health,
            statuses=(200, 503),
        ),
        Endpoint(
            methods=("GET",),
            path="/version",
            right=GATEWAY + "ListModels",
            handler=routes.version,
            summary="Say which build this is.",
            answer=Version,
        ),
        Endpoint(
            methods=("GET",),
            path="/load",
            right=GATEWAY + "ListModels",
            handler=routes.load,
            summary="Say how many requests this gateway has.",
            answer=Load,
        ),
    ]


class _Service:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def metrics(self, request: Request) -> Response:
        """Say where they went: a client that reaches this port need not learn how the service fares."""
        text = f"metrics are not served here: GET /metrics on {self._context.metrics_address()} (--metrics-port)\n"
        return PlainTextResponse(text, 404)

    async def health(self, request: Request) -> Response:
        """Say whether requests can be served."""
        is_ready = self._context.is_ready()
        return json_response(Health(status="ok" if is_ready else "not ready"), 200 if is_ready else 503)

    async def version(self, request: Request, admission: Admission) -> Response:
        """Say which build this is, as vLLM does."""
        return json_response(Version(version=package_version()))

    async def load(self, request: Request, admission: Admission) -> Response:
        """Say how many requests run or wait here, on all workers, as vLLM does."""
        return json_response(Load(server_load=await self._context.num_requests()))
