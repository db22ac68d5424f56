"""The routes of the HTTP port: OpenAI's API, /metrics, /health, /version."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from loraplex_common.auth import Authenticator
from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.ids import new_request_id
from loraplex_common.interceptors import internal_error
from loraplex_common.version import package_version
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraplex_gateway.core import GatewayCore
from loraplex_gateway.listing import ModelListing
from loraplex_gateway.models import ModelCatalog, ServedModel
from loraplex_gateway.openai import convert
from loraplex_gateway.openai.choices import generate_choices
from loraplex_gateway.openai.errors import error_response
from loraplex_gateway.openai.render import Renderer, model_object
from loraplex_gateway.openai.responses import GenerationResponse
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.validation import is_request_id

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
    registry: CollectorRegistry
    slow_client_s: float
    is_ready: Callable[[], bool]


def make_app(context: HttpContext) -> Starlette:
    """Return the ASGI application."""
    routes = _Routes(context)
    return Starlette(
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
        card = await self._context.listing.get(request.path_params["name"], tenant.name)
        return JSONResponse(model_object(card, self._started_at))

    async def completions(self, request: Request) -> ASGIApp:
        """Continue text."""
        tenant = self._tenant(request)
        body = convert.decode(await _body(request), CompletionBody)
        request_id = _request_id(request)
        return self._generate(convert.completion_plan(body, self._context.catalog, request_id=request_id), tenant)

    async def chat_completions(self, request: Request) -> ASGIApp:
        """Continue a conversation."""
        tenant = self._tenant(request)
        body = convert.decode(await _body(request), ChatBody)
        request_id = _request_id(request)
        return self._generate(convert.chat_plan(body, self._context.catalog, request_id=request_id), tenant)

    async def metrics(self, request: Request) -> Response:
        """Show the metrics in Prometheus' text format."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._context.registry), media_type=None, headers={"content-type": content_type})

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
        request_id = plan.requests[0].request_id
        events = generate_choices(context.core, plan.requests, tenant=tenant.name)
        renderer = Renderer(plan, request_id=request_id, model=self._model(plan))
        return GenerationResponse(plan, events, renderer, request_id=request_id, slow_client_s=context.slow_client_s)

    def _model(self, plan: Plan) -> ServedModel | None:
        """Return the base model if it is plain which: only the bytes of log-probabilities' tokens need it."""
        models = self._context.catalog.models
        return models[0] if len(models) == 1 else self._context.catalog.find(plan.requests[0].model)

    def _tenant(self, request: Request) -> Tenant:
        return self._context.authenticator.authenticate(request.headers.get("authorization"))


async def _body(request: Request) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise InvalidParameterError(f"the body is longer than {MAX_BODY_BYTES} bytes", field="body")
        chunks.append(chunk)
    return b"".join(chunks)


def _request_id(request: Request) -> str:
    """Return the caller's id if it can be one; proxies put all sorts of things into the header."""
    given = request.headers.get("x-request-id", "")
    return given if is_request_id(given) else new_request_id()


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
