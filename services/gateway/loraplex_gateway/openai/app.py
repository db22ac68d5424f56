"""The routes of the HTTP port: OpenAI's API, /metrics, /health, /version."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from loraplex_common.auth import Authenticator
from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.exposition import Exposition
from loraplex_common.interceptors import internal_error
from loraplex_common.version import package_version
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraplex_gateway.core import GatewayCore
from loraplex_gateway.listing import ModelListing
from loraplex_gateway.models import ModelCatalog
from loraplex_gateway.openai import convert, fields
from loraplex_gateway.openai.choices import generate_choices
from loraplex_gateway.openai.errors import BodyNames, error_response
from loraplex_gateway.openai.render import Renderer, model_object
from loraplex_gateway.openai.responses import GenerationResponse
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.openai.tracing import TraceIds, origin_of

if TYPE_CHECKING:
    from loraplex_common.auth import Tenant
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.convert import Plan

MAX_BODY_BYTES: Final = 4 * 1024 * 1024  # as a gRPC message


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpContext:
    """What the routes call."""

    core: GatewayCore
    catalog: ModelCatalog
    listing: ModelListing
    authenticator: Authenticator
    exposition: Exposition
    slow_client_s: float
    is_ready: Callable[[], bool]


def make_app(context: HttpContext) -> ASGIApp:
    """Return the ASGI application."""
    routes = _Routes(context)
    app = Starlette(
        routes=[
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/version", routes.version, methods=["GET"]),
            Route("/healthz", routes.health, methods=["GET"]),
        ],
        exception_handlers={LoraplexError: _on_error, HTTPException: _on_no_route, Exception: _on_unexpected},
    )
    return TraceIds(app)


class _Routes:
    def __init__(self, context: HttpContext) -> None:
        self._context = context
        self._started_at = int(time.time())

    async def models(self, request: Request) -> Response:
        """List base models and adapters."""
        cards = self._context.listing.all(self._tenant(request).name)
        data = [model_object(card, self._started_at) for card in cards]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """Describe one base model or adapter."""
        tenant = self._tenant(request)
        try:
            card = await self._context.listing.get(request.path_params["name"], tenant.name)
        except LoraplexError as error:
            return error_response(error, BodyNames(fields.MODEL_PATH))
        return JSONResponse(model_object(card, self._started_at))

    async def completions(self, request: Request) -> ASGIApp:
        """Continue text."""
        tenant = self._tenant(request)
        body = convert.decode(await _body(request), CompletionBody)
        return self._generate(
            convert.completion_plan(body, self._context.catalog, origin=origin_of(request.scope)), tenant
        )

    async def chat_completions(self, request: Request) -> ASGIApp:
        """Continue a conversation."""
        tenant = self._tenant(request)
        body = convert.decode(await _body(request), ChatBody)
        return self._generate(convert.chat_plan(body, self._context.catalog, origin=origin_of(request.scope)), tenant)

    async def metrics(self, request: Request) -> Response:
        """Show the metrics."""
        accept = ",".join(request.headers.getlist("accept"))
        page = self._context.exposition.render(accept=accept, authorization=request.headers.get("authorization"))
        return Response(page.body, media_type=None, headers={"content-type": page.content_type})

    async def health(self, request: Request) -> Response:
        """Say whether requests can be served."""
        is_ready = self._context.is_ready()
        body = {"status": "ok" if is_ready else "not ready"}
        return Response(msgspec.json.encode(body), 200 if is_ready else 503, media_type="application/json")

    async def version(self, request: Request) -> Response:
        """Say which build this is, as vLLM does."""
        return JSONResponse({"version": package_version()})

    def _generate(self, plan: Plan, tenant: Tenant) -> ASGIApp:
        context = self._context
        events = generate_choices(context.core, plan.requests, tenant=tenant.name)
        renderer = Renderer(plan, request_id=plan.requests[0].request_id)
        return GenerationResponse(plan, events, renderer, slow_client_s=context.slow_client_s)

    def _tenant(self, request: Request) -> Tenant:
        return self._context.authenticator.authenticate(request.headers.get("authorization"))


async def _body(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidParameterError(
            f"Content-Encoding {encoding[:64]} is not served; send the body as it is", field="body"
        )
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise InvalidParameterError(f"the body is longer than {MAX_BODY_BYTES} bytes", field="body")
        chunks.append(chunk)
    return b"".join(chunks)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraplexError)
    return error_response(error)


async def _on_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not served here: {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return error_response(internal_error(request.url.path, error))
