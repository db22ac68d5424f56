"""The routes of the HTTP port: OpenAI's API, /metrics, /health, /version."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.auth import Authenticator
from loraplex_common.errors import LoraplexError
from loraplex_common.exposition import Exposition
from loraplex_common.interceptors import internal_error
from loraplex_common.version import package_version
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraplex_gateway.core import GatewayCore
from loraplex_gateway.fair_workers import FairWorkers
from loraplex_gateway.listing import ModelListing
from loraplex_gateway.models import ModelCatalog
from loraplex_gateway.openai import convert, fields
from loraplex_gateway.openai.body_reader import BodyReader
from loraplex_gateway.openai.choices import generate_choices
from loraplex_gateway.openai.errors import BodyNames, error_response
from loraplex_gateway.openai.render import Renderer, model_object
from loraplex_gateway.openai.responses import GenerationResponse
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.openai.tracing import TraceIds, origin_of
from loraplex_gateway.quotas.calls import TenantQuotas

if TYPE_CHECKING:
    from loraplex_common.auth import Principal
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.convert import Plan

MODELS_AT_A_TIME: Final = 256
# A millisecond or two of reading JSON.
INLINE_MAX_BODY_BYTES: Final = 32 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpContext:
    """What the routes call."""

    core: GatewayCore
    quotas: TenantQuotas
    catalog: ModelCatalog
    listing: ModelListing
    authenticator: Authenticator
    exposition: Exposition
    bodies: BodyReader
    workers: FairWorkers
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
        data: list[dict[str, Any]] = []
        for card in self._context.listing.all(self._tenant(request).name):
            data.append(model_object(card, self._started_at))
            if len(data) % MODELS_AT_A_TIME == 0:
                await asyncio.sleep(0)  # streams go on meanwhile
        return Response(msgspec.json.encode({"object": "list", "data": data}), media_type="application/json")

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
        catalog, origin = self._context.catalog, origin_of(request.scope)
        return await self._planned(
            request, lambda data: convert.completion_plan(convert.decode(data, CompletionBody), catalog, origin=origin)
        )

    async def chat_completions(self, request: Request) -> ASGIApp:
        """Continue a conversation."""
        catalog, origin = self._context.catalog, origin_of(request.scope)
        return await self._planned(
            request, lambda data: convert.chat_plan(convert.decode(data, ChatBody), catalog, origin=origin)
        )

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

    async def _planned(self, request: Request, plan: Callable[[bytes], Plan]) -> ASGIApp:
        context, tenant = self._context, self._tenant(request)
        async with context.bodies.read(request, tenant=tenant.name) as data:
            if len(data) <= INLINE_MAX_BODY_BYTES:
                return self._generate(plan(data), tenant)
            work = functools.partial(plan, data)
            return self._generate(await context.workers.run(work, tenant=tenant.name, num_bytes=len(data)), tenant)

    def _generate(self, plan: Plan, tenant: Principal) -> ASGIApp:
        context = self._context
        quota = context.quotas.call(tenant.name, len(plan.requests))
        events = generate_choices(context.core, plan.requests, tenant=tenant.name, quota=quota)
        renderer = Renderer(plan, request_id=plan.requests[0].request_id)
        return GenerationResponse(plan, events, renderer, quota=quota, slow_client_s=context.slow_client_s)

    def _tenant(self, request: Request) -> Principal:
        return self._context.authenticator.authenticate(request.headers.get("authorization"))


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
