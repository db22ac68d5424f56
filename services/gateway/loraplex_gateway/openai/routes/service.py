"""What tools and probes ask: /health, /version, and a sign to /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from loraplex_common.rights import GATEWAY
from loraplex_common.version import package_version
from starlette.responses import JSONResponse, PlainTextResponse, Response

from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from starlette.requests import Request

    from loraplex_gateway.openai.context import HttpContext


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes about the service itself."""
    routes = _Service(context)
    return [
        OpenEndpoint(path="/metrics", handler=routes.metrics, summary="Say where metrics are."),
        OpenEndpoint(path="/health", handler=routes.health, summary="Say whether requests can be served."),
        OpenEndpoint(path="/healthz", handler=routes.health, summary="As /health."),
        Endpoint(
            methods=("GET",),
            path="/version",
            right=GATEWAY + "ListModels",
            handler=routes.version,
            summary="Say which build this is.",
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
        body = {"status": "ok" if is_ready else "not ready"}
        return Response(msgspec.json.encode(body), 200 if is_ready else 503, media_type="application/json")

    async def version(self, request: Request, admission: Admission) -> Response:
        """Say which build this is, as vLLM does."""
        return JSONResponse({"version": package_version()})
