"""The ASGI application of the HTTP port, put together from the families of routes.

A further family is a function that takes the `HttpContext` and returns its endpoints, and one line in `FAMILIES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
from loraplex_common.errors import LoraplexError
from loraplex_common.interceptors import internal_error
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from loraplex_gateway.openai.context import HttpContext
from loraplex_gateway.openai.cors import Cors
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.errors import error_response
from loraplex_gateway.openai.messages_api import routes as messages
from loraplex_gateway.openai.openapi import document
from loraplex_gateway.openai.responses_api import routes as responses
from loraplex_gateway.openai.routes import adapters, generation, models, service, text
from loraplex_gateway.openai.tracing import TraceIds
from loraplex_gateway.openai.ui import routes as ui

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

Family = Callable[[HttpContext], list[Endpoint | OpenEndpoint]]
"""Routes that belong together."""

FAMILIES: Final[tuple[Family, ...]] = (
    models.endpoints,
    generation.endpoints,
    responses.endpoints,
    messages.endpoints,
    text.endpoints,
    adapters.endpoints,
    service.endpoints,
)


MAX_SHOWN_CHARS: Final = 256


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return every route, that of the document of all others included."""
    known = [endpoint for family in FAMILIES for endpoint in family(context)]
    body = functools.cache(lambda: msgspec.json.encode(document(known)))

    async def openapi(request: Request) -> Response:
        return Response(body(), media_type="application/json")

    known.append(OpenEndpoint(path="/openapi.json", handler=openapi, summary="Return this document."))
    return known


def make_app(context: HttpContext) -> ASGIApp:
    """Return the ASGI application."""
    app = Starlette(
        routes=[endpoint.route(context) for endpoint in (*endpoints(context), *ui.endpoints(context))],
        exception_handlers={LoraplexError: _on_error, HTTPException: _on_no_route, Exception: _on_unexpected},
    )
    traced = TraceIds(app)
    return Cors(traced, context.cors_origins) if context.cors_origins else traced


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraplexError)
    return error_response(error)


async def _on_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope.get("raw_path", b"").decode("latin-1")  # a line break in it as the client wrote it
    message = f"{request.method} {path[:MAX_SHOWN_CHARS]} is not served here: {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return error_response(internal_error(request.url.path, error))
